"""The network as others run it: an ONNX file in onnxruntime, one input at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .extras import need


class Runtime:
    """An ONNX file of one float input and one output, on one thread of the CPU; by it witnesses are judged.

    ``shape``: of its input, free dimensions (the batch) as 1.
    """

    def __init__(self, path: str | Path) -> None:
        onnxruntime = need("onnxruntime")
        if not Path(path).is_file():
            raise InputError(f"There is no network {path}. Give the path of an ONNX file.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # old files list their weights as inputs, of which every run would warn
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds of errors have no common base
            raise InputError(
                f"{path} cannot be run by onnxruntime: {str(error).splitlines()[0]}. Give an ONNX file."
            ) from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(self._session.get_outputs()) != 1 or inputs[0].type != "tensor(float)":
            kinds = ", ".join(f"{i.name}: {i.type}" for i in inputs)
            raise InputError(
                f"{path} must have one float input and one output, but has the inputs {kinds} and "
                f"{len(self._session.get_outputs())} outputs; cut it to one of each."
            )
        self.name = inputs[0].name
        self.shape = tuple(size if isinstance(size, int) and size > 0 else 1 for size in inputs[0].shape)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (n, outputs), float32, of inputs (n, inputs), each read row by row; one run for each."""
        rows = [
            torch.from_numpy(self._session.run(None, {self.name: row.reshape(self.shape).numpy()})[0]).flatten()
            for row in x.detach().cpu().float()
        ]
        return torch.stack(rows)
