"""One run of a traced network on random inputs, and what can be seen only while it runs: whose memory is whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import InputError
from . import spellings


@dataclass(frozen=True)
class Run:
    """What became of every node of a traced network for one batch of inputs."""

    values: dict[fx.Node, Any]
    memory: dict[fx.Node, int]  # of tensors that hold anything: where it begins, the same for all views
    overwritten: dict[fx.Node, list[fx.Node]]  # by each node: which of its inputs it changed in place


def record(module: fx.GraphModule, x: Tensor) -> Run:
    """Run ``module`` on ``x`` (batch, *shape); BatchNorm's running statistics stay as they are.

    Raises InputError if it cannot take such inputs.
    """
    recorder = _Recorder(module)
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not count their changes
            recorder.run(x.clone(), enable_io_processing=False)
    except Exception as error:
        raise InputError(
            f"The model should take inputs of shape (batch, {', '.join(map(str, x.shape[1:]))}), but running it on "
            f"random ones failed: {str(error).splitlines()[0]}. Check the model against the shape of the data."
        ) from error
    return Run(recorder.env, recorder.memory, recorder.overwritten)


class _Recorder(fx.Interpreter):
    """All values stay alive until the end, so that no memory is used twice."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.memory: dict[fx.Node, int] = {}
        self.overwritten: dict[fx.Node, list[fx.Node]] = {}

    def run_node(self, node: fx.Node) -> Any:
        before = {parent: _changes(self.env[parent]) for parent in node.all_input_nodes}
        skipped = spellings.is_batch_norm(node, self.module)
        value = self.env[node.args[0]].clone() if skipped else super().run_node(node)
        self.overwritten[node] = [p for p, count in before.items() if _changes(self.env[p]) != count]
        if isinstance(value, Tensor) and value.numel():
            self.memory[node] = value.untyped_storage().data_ptr()
        return value


def _changes(value: Any) -> int:
    """How often a tensor was changed in place; views share the count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
