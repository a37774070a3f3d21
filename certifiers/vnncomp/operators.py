"""One function per ONNX operator: the torch layers that compute the same. To add one: a line at the end.

Here are the affine ones; those that only move values are in shaping.py, those made of ReLUs in piecewise.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import piecewise, shaping
from .call import Call, frozen
from .extras import need


def _linear(call: Call, weight: Tensor, bias: Tensor | None, place: int = 0) -> fx.Node:
    """``x @ weight + bias`` for weights (in, out), where x is the input at ``place``."""
    layer = nn.Linear(*weight.shape, bias=bias is not None)
    layer.weight = frozen(weight.T)
    if bias is not None:
        layer.bias = frozen(bias.expand(weight.shape[1]))
    return call.layer(layer, place)


def gemm(call: Call) -> fx.Node:
    if call.attribute("transA", 0):
        raise call.refuse("transA is not known")
    weight, bias = call.constant(1, "weight"), call.optional(2, "bias")
    weight = weight.T if call.attribute("transB", 0) else weight
    bias = None if bias is None else bias.flatten() * call.attribute("beta", 1.0)
    return _linear(call, weight * call.attribute("alpha", 1.0), bias)


def matmul(call: Call) -> fx.Node:
    if call.is_constant(0) and call.without_batch:  # a matrix times a vector
        weight = call.constant(0, "first factor")
        if weight.dim() != 2:
            raise call.refuse(f"its first factor must be a matrix, not of shape {tuple(weight.shape)}")
        return _linear(call, weight.T, None, place=1)
    weight = call.constant(1, "second factor")
    if weight.dim() != 2:
        raise call.refuse(f"its second factor must be a matrix, not of shape {tuple(weight.shape)}")
    if len(call.shape()) != 2:
        raise call.refuse(f"its first factor must be flat (batch, features), not of shape {call.shape()}")
    return _linear(call, weight, None)


def _pads(call: Call, kernel: list[int], strides: list[int], dilations: list[int]) -> list[tuple[int, int]]:
    """How many cells are put (before, behind) each spatial axis."""
    automatic = call.attribute("auto_pad", b"NOTSET")
    if automatic in (b"NOTSET", b"VALID", b""):
        pads = list(call.attribute("pads", [0] * 2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    found = []
    for size, cells, stride, dilation in zip(call.shape()[2:], kernel, strides, dilations, strict=True):
        count = -(-size // stride)
        total = max((count - 1) * stride + dilation * (cells - 1) + 1 - size, 0)
        half = (total // 2, total - total // 2)
        found.append(half if automatic == b"SAME_UPPER" else half[::-1])
    return found


def _pool(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, strides and padding of a pooling."""
    _is_image(call)
    kernel, strides = list(call.attribute("kernel_shape")), list(call.attribute("strides", [1, 1]))
    pads = _pads(call, kernel, strides, list(call.attribute("dilations", [1, 1])))
    if any(before != behind for before, behind in pads):
        raise call.refuse(f"it pads unevenly, by {pads}")
    return tuple(kernel), tuple(strides), tuple(before for before, _ in pads)


def _is_image(call: Call) -> None:
    if len(call.shape()) != 4:
        raise call.refuse(f"only images (batch, channels, height, width) are known, not the shape {call.shape()}")


def conv(call: Call) -> fx.Node:
    """Of images, or of sequences (batch, channels, length), which are images of height 1."""
    weight, bias, value = call.constant(1, "weight"), call.optional(2, "bias"), call.value()
    flat = len(call.shape()) == 3
    if not flat:
        _is_image(call)
    settings = [list(call.attribute(name, [1] * (weight.dim() - 2))) for name in ("strides", "dilations")]
    pads = _pads(call, list(weight.shape[2:]), *settings)
    if flat:
        weight, pads, settings = weight.unsqueeze(2), [(0, 0), *pads], [[1, *each] for each in settings]
        value = call.reshaped((*call.shape()[:2], 1, call.shape()[2]))
    even, groups = all(before == behind for before, behind in pads), call.attribute("group", 1)
    value = value if even else shaping.padded_image(call, value, call.shape()[1], pads)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(settings[0]),
        tuple(before for before, _ in pads) if even else 0,
        tuple(settings[1]),
        groups,
        bias=bias is not None,
    )
    layer.weight = frozen(weight)
    if bias is not None:
        layer.bias = frozen(bias)
    result = call.apply(layer, value)
    return call.function(torch.squeeze, result, 2) if flat else result


def conv_transpose(call: Call) -> fx.Node:
    """Written out as a matrix."""
    _is_image(call)
    weight, bias = call.constant(1, "weight"), call.optional(2, "bias")
    if call.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"") or "output_shape" in call.attributes:
        raise call.refuse("auto_pad and output_shape are not known; give the padding in numbers")
    pads = list(call.attribute("pads", [0] * 4))
    if pads[:2] != pads[2:]:
        raise call.refuse(f"it pads unevenly, by {pads}")
    options = (
        list(call.attribute("strides", [1, 1])),
        pads[:2],
        list(call.attribute("output_padding", [0, 0])),
        call.attribute("group", 1),
        list(call.attribute("dilations", [1, 1])),
    )

    def spread(ones: Tensor) -> Tensor:
        return F.conv_transpose2d(ones.reshape(-1, *call.shape()[1:]), weight, None, *options).flatten(1)

    size = prod(call.shape())
    shape = F.conv_transpose2d(torch.zeros(call.shape()), weight, None, *options).shape
    result = call.reshaped(tuple(shape), call.matrix(spread, call.reshaped((1, size)), size, prod(shape)))
    return result if bias is None else call.function(operator.add, result, call.buffer(bias.reshape(1, -1, 1, 1)))


def reduce_sum(call: Call) -> fx.Node:
    return _reduced(call)[0]


def reduce_mean(call: Call) -> fx.Node:
    result, count = _reduced(call)
    return call.function(operator.truediv, result, float(count))


def _reduced(call: Call) -> tuple[fx.Node, int]:
    """The sums over some axes, and of how many values each is."""
    shape = call.shape()
    axes = call.attribute("axes") or (call.constant(1, "axes").tolist() if call.has(1) else None)
    axes = range(1, len(shape)) if axes is None else [call.axis(axis) for axis in axes]
    if 0 in axes:
        raise call.refuse("it sums over the batch")
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    size, out = prod(shape), prod(kept)

    def added(ones: Tensor) -> Tensor:
        return ones.reshape(-1, *shape[1:]).sum(list(axes)).flatten(1)

    after = kept if call.attribute("keepdims", 1) else tuple(s for axis, s in enumerate(shape) if axis not in axes)
    return call.reshaped(after, call.matrix(added, call.reshaped((1, size)), size, out)), size // out


def cast(call: Call) -> fx.Node:
    if call.attribute("to") not in (need("onnx").TensorProto.FLOAT, need("onnx").TensorProto.DOUBLE):
        raise call.refuse("it makes another type of the values than a float")
    return identity(call)


def batch_normalization(call: Call) -> fx.Node:
    if call.attribute("training_mode", 0):
        raise call.refuse("it is in training mode")
    scale, bias, mean, var = (call.constant(i, "statistics") for i in (1, 2, 3, 4))
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(len(call.shape()))
    if kind is None:
        raise call.refuse(f"it is known of flat inputs and images, not of the shape {call.shape()}")
    layer = kind(len(scale), eps=call.attribute("epsilon", 1e-5))
    layer.weight, layer.bias = frozen(scale), frozen(bias)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    return call.layer(layer.eval())


def average_pool(call: Call) -> fx.Node:
    if any(d != 1 for d in call.attribute("dilations", [1, 1])):
        raise call.refuse("dilations are not known")
    counts = bool(call.attribute("count_include_pad", 0))
    return call.layer(nn.AvgPool2d(*_pool(call), bool(call.attribute("ceil_mode", 0)), counts))


def max_pool(call: Call) -> fx.Node:
    dilation, ceil = tuple(call.attribute("dilations", [1, 1])), bool(call.attribute("ceil_mode", 0))
    return call.layer(nn.MaxPool2d(*_pool(call), dilation, ceil_mode=ceil))


def global_average_pool(call: Call) -> fx.Node:
    _is_image(call)
    return call.layer(nn.AdaptiveAvgPool2d(1))


def arithmetic(target: Callable) -> Callable[[Call], fx.Node]:
    def convert(call: Call) -> fx.Node:
        # A constant with as many dimensions as the value must leave the batch alone; one with more adds dimensions.
        for place, other in ((0, 1), (1, 0)):
            if call.is_constant(place):
                shape = call.constant(place, "input").shape
                size = len(call.shape(other))
                if len(shape) > size or (len(shape) == size and shape[0] != 1):
                    raise call.refuse(f"its constant of shape {tuple(shape)} does not fit one input")
        return call.function(target, call.value(0), call.value(1))

    return convert


def identity(call: Call) -> fx.Node:
    return call.layer(nn.Identity())


#: What each operator becomes: one value, or one for each of its outputs.
OPERATORS: dict[str, Callable[[Call], fx.Node | list[fx.Node]]] = {
    "Abs": piecewise.absolute,
    "Add": arithmetic(operator.add),
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": piecewise.clip,
    "Concat": shaping.concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": arithmetic(operator.truediv),
    "Dropout": identity,
    "Expand": shaping.expand,
    "Flatten": shaping.flatten,
    "Gather": shaping.gather,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "Identity": identity,
    "LeakyRelu": lambda call: call.layer(nn.LeakyReLU(call.attribute("alpha", 0.01))),
    "MatMul": matmul,
    "Max": piecewise.maximum,
    "MaxPool": max_pool,
    "Min": piecewise.minimum,
    "Mul": arithmetic(operator.mul),
    "Neg": lambda call: call.function(operator.neg, call.value()),
    "PRelu": piecewise.prelu,
    "Pad": shaping.pad,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "Relu": lambda call: call.layer(nn.ReLU()),
    "Reshape": shaping.reshape,
    "Slice": shaping.slice_,
    "Split": shaping.split,
    "Squeeze": shaping.squeeze,
    "Sub": arithmetic(operator.sub),
    "Transpose": shaping.transpose,
    "Unsqueeze": shaping.unsqueeze,
}
