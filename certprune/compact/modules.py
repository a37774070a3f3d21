"""From steps to the description and the tensors of a plain module (layers.py builds it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certifiers.bounds.nonlinear import MaxPool2d, ReLU
from certifiers.bounds.operations import Add, AveragePool2d, Conv2d, Linear, Reshape, Scale, Select
from certifiers.errors import InputError
from certprune.compact.steps import Step, Steps, consumers

Described = list[tuple[dict[str, Any], dict[str, Tensor]]]  # one or more layers in a row, each with its tensors


def described(steps: Steps) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """The description of the steps, and by layer its tensors, in double precision.

    Raises InputError for a pooling that is none of torch's.
    """
    rows: list[dict[str, Any]] = []
    tensors: list[dict[str, Tensor]] = []
    where = {0: 0}
    readers = consumers(steps)
    for place, step in enumerate(steps[1:], start=1):
        inputs = [where[i] for i in step.inputs]
        source = step.inputs[0]
        # An activation may overwrite a fresh result that nobody else reads, which saves a pass over memory.
        own = isinstance(steps[source].operation, (Linear, Conv2d, Scale, Add)) and len(readers[source]) == 1
        for row, held in LAYERS[type(step.operation)](step):
            in_place = {"inplace": True} if isinstance(step.operation, ReLU) and own else {}
            rows.append({**row, **in_place, "inputs": inputs})
            tensors.append(held)
            inputs = [len(rows)]
        where[place] = len(rows)
    return rows, tensors


def _weighted(layer: Linear | Conv2d) -> dict[str, Tensor]:
    return {"weight": layer.weight} if layer.bias is None else {"weight": layer.weight, "bias": layer.bias}


def _linear(step: Step) -> Described:
    layer = step.operation
    outputs, inputs = layer.weight.shape
    options = {"in_features": inputs, "out_features": outputs, "bias": layer.bias is not None}
    return [({"kind": "linear", **options}, _weighted(layer))]


def _conv(step: Step) -> Described:
    layer = step.operation
    options = {
        "in_channels": layer.weight.shape[1] * layer.groups,
        "out_channels": layer.weight.shape[0],
        "kernel_size": list(layer.weight.shape[2:]),
        "stride": list(layer.stride),
        "padding": list(layer.padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "bias": layer.bias is not None,
    }
    return [({"kind": "conv", **options}, _weighted(layer))]


def _scale(step: Step) -> Described:
    scale, shift = (torch.as_tensor(v, dtype=torch.float64) for v in (step.operation.scale, step.operation.shift))
    if bool((scale == 1).all()):
        return [({"kind": "shift", "shift": list(shift.shape)}, {"shift": shift})]
    return [({"kind": "affine", "scale": list(scale.shape), "shift": list(shift.shape)},
             {"scale": scale, "shift": shift})]  # fmt: skip


def _relu(step: Step) -> Described:
    slope = step.operation.slope
    return [({"kind": "leaky_relu", "negative_slope": slope} if slope else {"kind": "relu"}, {})]


def _max_pool(step: Step) -> Described:
    pool = step.operation
    options = {"kernel_size": pool.kernel, "stride": pool.stride, "padding": pool.padding, "dilation": pool.dilation}
    return [({"kind": "max_pool", **{k: list(v) for k, v in options.items()}, "ceil_mode": pool.ceil_mode}, {})]


def _reshape(step: Step) -> Described:
    reshape = step.operation
    flat: Described = [] if len(reshape.before) == 1 else [({"kind": "flatten"}, {})]
    if len(reshape.after) == 1:
        return flat
    return [*flat, ({"kind": "unflatten", "dim": 1, "unflattened_size": list(reshape.after)}, {})]


def _average(step: Step) -> Described:
    """The torch layer whose matrices these are; the operation itself has forgotten how it was spelled."""
    pool = step.operation
    sizes = [len(pool.rows), len(pool.columns)]
    if _same(pool, lambda v, axis: F.adaptive_avg_pool1d(v, sizes[axis])):
        return [({"kind": "mean", "output_size": sizes}, {})]
    for counted in (True, False):
        for ceil in (False, True):
            kernel, stride, padding = zip(*(_geometry(m, counted) for m in (pool.rows, pool.columns)), strict=True)
            layer = (kernel, stride, padding, ceil, counted)
            if _same(pool, lambda v, axis, k=layer: F.avg_pool1d(v, k[0][axis], k[1][axis], k[2][axis], *k[3:])):
                sizes = {"kernel_size": list(kernel), "stride": list(stride), "padding": list(padding)}
                return [({"kind": "avg_pool", **sizes, "ceil_mode": ceil, "count_include_pad": counted}, {})]
    raise InputError(
        "This network pools averages in a way that certprune cannot write down again. Put an nn.AvgPool2d or an "
        "nn.AdaptiveAvgPool2d there."
    )


def _geometry(matrix: Tensor, counted: bool) -> tuple[int, int, int]:
    """Kernel, stride and padding of a 1-d average pooling, read off its matrix (out, in)."""
    reads = matrix != 0
    kernel = int(reads.sum(1).max())
    if counted:  # each weight is one by the kernel, even where some of it lies outside
        kernel = round(1 / float(matrix[matrix != 0].min()))
    first = reads.double().argmax(1)
    ends = first + reads.sum(1)
    stride = int((ends[1] - ends[0]).clamp(min=1)) if len(matrix) > 1 else kernel
    return kernel, stride, max(kernel - int(ends[0]), 0)


def _same(pool: AveragePool2d, again: Callable[[Tensor, int], Tensor]) -> bool:
    for axis, matrix in enumerate((pool.rows, pool.columns)):
        eye = torch.eye(matrix.shape[1], dtype=torch.float64).unsqueeze(0)
        try:
            found = again(eye, axis)[0].T
        except RuntimeError:  # a padding that torch refuses
            return False
        if found.shape != matrix.shape or not torch.allclose(found, matrix, rtol=1e-6, atol=1e-9):
            return False
    return True


def _select(step: Step) -> Described:
    index = step.operation.index
    return [({"kind": "select", "size": len(index)}, {"index": index})]


def _add(step: Step) -> Described:
    return [({"kind": "sum" if step.operation.sign > 0 else "difference"}, {})]


LAYERS: dict[type, Callable[[Step], Described]] = {
    Linear: _linear,
    Conv2d: _conv,
    Scale: _scale,
    ReLU: _relu,
    MaxPool2d: _max_pool,
    AveragePool2d: _average,
    Reshape: _reshape,
    Select: _select,
    Add: _add,
}


def named(rows: list[dict[str, Any]], tensors: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in the module's ``state_dict``."""
    counts: dict[str, int] = {}
    chain = all(row["inputs"] == [place] for place, row in enumerate(rows))
    for row, held in zip(rows, tensors, strict=True):
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
        for name, tensor in held.items():
            yield f"{'' if chain else 'layers.'}{row['kind']}{counts[row['kind']]}.{name}", tensor
