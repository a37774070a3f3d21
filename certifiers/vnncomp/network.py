"""An ONNX file as a plain ``nn.Module``: a graph of torch's own layers that bound propagation can trace.

Constants are folded by ONNX's reference evaluator; what is left becomes one torch layer or function per node
(operators.py), and the result is held against onnxruntime before anyone may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..bounds.agreement import agree, shaken
from ..errors import InputError, UnsupportedLayer
from .call import Call
from .extras import need
from .operators import OPERATORS
from .runtime import Runtime

_BATCH = 2  # of the example that is carried along: a shape that fixes the batch to 1 is found out


@dataclass(frozen=True)
class OnnxNetwork:
    """A network read from a file: ``model`` (batch, inputs) -> (batch, outputs), eval mode, float32.

    ``runtime`` runs the file itself.
    """

    model: nn.Module
    runtime: Runtime
    inputs: int
    outputs: int


def read_network(path: str | Path) -> OnnxNetwork:
    """The network in an ONNX file, checked against onnxruntime on random inputs in [-1, 1].

    Raises UnsupportedLayer for an operator that has no counterpart here, naming it, or where the two differ;
    InputError for a file that is no such network. :func:`check_agreement` checks on inputs of a property's box.
    """
    onnx = need("onnx")
    runtime = Runtime(path)
    graph = _Reader(path, onnx.load(str(path)), runtime).graph()
    size = prod(runtime.shape)
    with torch.no_grad():
        outputs = graph(torch.zeros(1, size)).shape[1]
    network = OnnxNetwork(graph, runtime, size, outputs)
    generator = torch.Generator().manual_seed(0)
    check_agreement(network, 2 * torch.rand(4, size, generator=generator) - 1)
    return network


@torch.no_grad()
def check_agreement(network: OnnxNetwork, x: Tensor) -> None:
    """Raise UnsupportedLayer unless model and file compute the same for inputs (n, inputs), up to rounding."""
    ours, theirs = network.model(x.float()), network.runtime(x)
    if not agree(theirs, ours, 1e-5, lambda: _Shaken(network.model).run(x.float())):
        raise UnsupportedLayer(
            "The network that was read computes other values than onnxruntime gives for the file, so nothing is "
            "claimed about it. Please report this with the file."
        )


class _Shaken(fx.Interpreter):
    """Runs a network where every value on the way is off by a little."""

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        moves = node.op not in ("get_attr", "output") and isinstance(value, Tensor) and value.is_floating_point()
        return shaken(value) if moves else value


class _Reader:
    """Reads one file; operators ask it for their inputs, attributes and names."""

    def __init__(self, path: str | Path, file: Any, runtime: Runtime) -> None:
        self.path, self.file, self.runtime = path, file, runtime
        self.layers = nn.Module()
        self.fx = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.computed: dict[str, fx.Node] = {}
        self.examples: dict[str, Tensor] = {}  # each computed value for a batch of zeros

    def graph(self) -> fx.GraphModule:
        onnx, graph = need("onnx"), self.file.graph
        for weight in graph.initializer:
            self.constants[weight.name] = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())
        self._begin()
        for node in graph.node:
            if not any(name in self.computed for name in node.input):
                self._fold(node)
            elif node.op_type == "Shape":
                sizes = [1, *self.examples[node.input[0]].shape[1:]]
                ends = {ends.name: ends.i for ends in node.attribute}
                self.constants[node.output[0]] = torch.tensor(sizes[ends.get("start", 0) : ends.get("end")])
            else:
                self._convert(node)
        (result,) = (output.name for output in graph.output)
        if result not in self.computed:
            raise InputError(f"The output of {self.path} does not depend on its input.")
        last = self.computed[result]
        if self.examples[result].dim() != 2:
            last = self.fx.call_method("flatten", (last, 1))
        self.fx.output(last)
        return fx.GraphModule(self.layers, self.fx).eval()

    def _begin(self) -> None:
        """The input comes flat; it is given the file's shape, whose first dimension is the batch if it is 1."""
        shape = self.runtime.shape
        x = self.fx.placeholder("x")
        inner = shape[1:] if len(shape) > 1 else shape
        if len(shape) > 1 and shape[0] != 1:
            raise UnsupportedLayer(
                f"{self.path} takes a batch of {shape[0]} inputs at once, but networks are read that take one. Export "
                "it with a batch of 1."
            )
        if len(inner) > 1:
            x = self.fx.call_method("unflatten", (x, 1, inner))
        self.computed[self.runtime.name] = x
        self.examples[self.runtime.name] = torch.zeros(_BATCH, *inner)

    def _fold(self, node: Any) -> None:
        """A node that depends on constants alone."""
        reference = need("onnx.reference")
        helper = need("onnx.helper")
        values = {name: self.constants[name].numpy() for name in node.input if name}
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_tensor_value_info(name, 0, None) for name in values],
            [helper.make_tensor_value_info(name, 0, None) for name in node.output],
        )
        model = helper.make_model(graph, opset_imports=self.file.opset_import)
        try:
            results = reference.ReferenceEvaluator(model).run(None, values)
        except Exception as error:  # whatever the evaluator's operators raise
            raise self.unsupported(node, f"it cannot be computed beforehand ({error})") from error
        for name, value in zip(node.output, results, strict=True):
            self.constants[name] = torch.tensor(value)

    def _convert(self, node: Any) -> None:
        convert: Callable[[Call], fx.Node | list[fx.Node]] | None = (
            OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        )
        if convert is None:
            raise self.unsupported(node, "its bounds are not known")
        made = convert(Call(self, node))
        made = made if isinstance(made, list) else [made]
        outputs = [name for name in node.output if name]
        if len(outputs) != len(made):
            raise self.unsupported(node, "only its first output is known")
        for name, value in zip(outputs, made, strict=True):
            try:
                with torch.no_grad():
                    example = self._run(value)
            except (RuntimeError, IndexError, ValueError) as error:
                raise self.unsupported(node, f"torch cannot compute it ({str(error).splitlines()[0]})") from error
            if example.dim() < 2 or len(example) != _BATCH:
                raise self.unsupported(node, "its result does not keep the batch as first dimension")
            self.computed[name], self.examples[name] = value, example

    def _run(self, made: fx.Node) -> Tensor:
        """What a new node gives for the examples of its inputs."""
        examples = {node: self.examples[name] for name, node in self.computed.items()}

        def value(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            return examples[argument] if argument in examples else self._run(argument)

        arguments = fx.map_arg(made.args, value)
        if made.op == "get_attr":
            return getattr(self.layers, made.target)
        if made.op == "call_module":
            return getattr(self.layers, made.target).eval()(*arguments)
        if made.op == "call_method":
            return getattr(arguments[0], made.target)(*arguments[1:])
        return made.target(*arguments)

    def unsupported(self, node: Any, why: str) -> UnsupportedLayer:
        name = f" {node.name!r}" if node.name else ""
        return UnsupportedLayer(
            f"{self.path} holds the operator {node.op_type}{name}, which cannot be read: {why}. Supported are: "
            f"{', '.join(sorted(OPERATORS))}, and anything that depends on constants alone."
        )
