"""One function per ONNX operator: the torch layer or function that computes the same. To add one: a line at the end.

The batch is the first dimension here as in the file, so that axes need no translation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .extras import need


class Call:
    """One node of the file, with its inputs looked up; what operators below need of the reader."""

    def __init__(self, reader: Any, node: Any) -> None:
        self.reader, self.node = reader, node
        self.without_batch = len(reader.runtime.shape) == 1  # vectors in, vectors out
        self.attributes = {a.name: need("onnx.helper").get_attribute_value(a) for a in node.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, place: int) -> bool:
        return place < len(self.node.input) and self.node.input[place] != ""

    def is_constant(self, place: int) -> bool:
        return self.node.input[place] in self.reader.constants

    def constant(self, place: int, what: str) -> Tensor:
        """The input at ``place``, which must not depend on the network's input."""
        if not self.has(place) or not self.is_constant(place):
            raise self.refuse(f"its {what} must be a constant")
        return self.reader.constants[self.node.input[place]]

    def optional(self, place: int, what: str) -> Tensor | None:
        return self.constant(place, what) if self.has(place) else None

    def value(self, place: int = 0) -> fx.Node:
        """The input at ``place``; a constant becomes a buffer."""
        name = self.node.input[place]
        if name in self.reader.computed:
            return self.reader.computed[name]
        buffer = f"constant_{len(list(self.reader.layers.buffers(recurse=False)))}"
        self.reader.layers.register_buffer(buffer, self.constant(place, "input"))
        return self.reader.fx.get_attr(buffer)

    def shape(self, place: int = 0) -> tuple[int, ...]:
        """The shape of a computed input, the batch (as 1) first."""
        return (1, *self.reader.examples[self.node.input[place]].shape[1:])

    def layer(self, module: nn.Module, place: int = 0) -> fx.Node:
        name = f"{type(module).__name__.lower()}_{len(list(self.reader.layers.children()))}"
        self.reader.layers.add_module(name, module)
        return self.reader.fx.call_module(name, (self.value(place),))

    def function(self, target: Callable, *arguments: Any) -> fx.Node:
        return self.reader.fx.call_function(target, arguments)

    def reshaped(self, shape: tuple[int, ...]) -> fx.Node:
        """The first input in another shape, given with a batch of 1."""
        if not shape or shape[0] != 1:
            raise self.refuse("its result does not keep the batch as first dimension")
        if len(shape) == 1:
            raise self.refuse("nothing but the batch is left of the shape")
        return self.reader.fx.call_method("reshape", (self.value(), -1, *shape[1:]))

    def refuse(self, why: str) -> Exception:
        return self.reader.unsupported(self.node, why)


def _linear(call: Call, weight: Tensor, bias: Tensor | None, place: int = 0) -> fx.Node:
    """``x @ weight + bias`` for weights (in, out), where x is the input at ``place``."""
    layer = nn.Linear(*weight.shape, bias=bias is not None)
    layer.weight = _frozen(weight.T)
    if bias is not None:
        layer.bias = _frozen(bias.expand(weight.shape[1]))
    return call.layer(layer, place)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone().contiguous(), requires_grad=False)


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


def _padding(call: Call, spatial: int) -> tuple[int, ...]:
    if call.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        raise call.refuse("auto_pad is not known; give the padding in numbers")
    pads = list(call.attribute("pads", [0] * 2 * spatial))
    if pads[:spatial] != pads[spatial:]:
        raise call.refuse(f"it pads unevenly, by {pads}")
    return tuple(pads[:spatial])


def _is_image(call: Call) -> None:
    if len(call.shape()) != 4:
        raise call.refuse(f"only images (batch, channels, height, width) are known, not the shape {call.shape()}")


def conv(call: Call) -> fx.Node:
    _is_image(call)
    weight, bias = call.constant(1, "weight"), call.optional(2, "bias")
    groups = call.attribute("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(call.attribute("strides", [1, 1])),
        _padding(call, 2),
        tuple(call.attribute("dilations", [1, 1])),
        groups,
        bias=bias is not None,
    )
    layer.weight = _frozen(weight)
    if bias is not None:
        layer.bias = _frozen(bias)
    return call.layer(layer)


def batch_normalization(call: Call) -> fx.Node:
    if call.attribute("training_mode", 0):
        raise call.refuse("it is in training mode")
    scale, bias, mean, var = (call.constant(i, "statistics") for i in (1, 2, 3, 4))
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(len(call.shape()))
    if kind is None:
        raise call.refuse(f"it is known of flat inputs and images, not of the shape {call.shape()}")
    layer = kind(len(scale), eps=call.attribute("epsilon", 1e-5))
    layer.weight, layer.bias = _frozen(scale), _frozen(bias)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    return call.layer(layer.eval())


def average_pool(call: Call) -> fx.Node:
    _is_image(call)
    if any(d != 1 for d in call.attribute("dilations", [1, 1])):
        raise call.refuse("dilations are not known")
    kernel = tuple(call.attribute("kernel_shape"))
    strides, padding = tuple(call.attribute("strides", [1, 1])), _padding(call, 2)
    counts = bool(call.attribute("count_include_pad", 0))
    return call.layer(nn.AvgPool2d(kernel, strides, padding, bool(call.attribute("ceil_mode", 0)), counts))


def max_pool(call: Call) -> fx.Node:
    _is_image(call)
    kernel = tuple(call.attribute("kernel_shape"))
    strides, padding = tuple(call.attribute("strides", [1, 1])), _padding(call, 2)
    dilation, ceil = tuple(call.attribute("dilations", [1, 1])), bool(call.attribute("ceil_mode", 0))
    return call.layer(nn.MaxPool2d(kernel, strides, padding, dilation, ceil_mode=ceil))


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


def gather(call: Call) -> fx.Node:
    places = call.constant(1, "indices")
    if call.attribute("axis", 0) not in (1, -1) or len(call.shape()) != 2 or places.dim() != 1:
        raise call.refuse("only features of flat inputs (batch, features) can be gathered, by a list of them")
    places = places % call.shape()[1]  # negative ones count from the end
    buffer = f"places_{len(list(call.reader.layers.buffers(recurse=False)))}"
    call.reader.layers.register_buffer(buffer, places)
    return call.function(torch.index_select, call.value(), 1, call.reader.fx.get_attr(buffer))


def flatten(call: Call) -> fx.Node:
    shape, axis = call.shape(), call.attribute("axis", 1)
    if axis % len(shape) != 1 and any(size != 1 for size in shape[1 : axis % len(shape)]):
        raise call.refuse(f"it flattens from axis {axis}, across the batch")
    return call.layer(nn.Flatten())


def reshape(call: Call) -> fx.Node:
    wanted = call.constant(1, "shape").tolist()
    before = call.shape()
    if not call.attribute("allowzero", 0):
        wanted = [before[i] if size == 0 else size for i, size in enumerate(wanted)]
    return call.reshaped(tuple(torch.zeros(before).reshape(wanted).shape))


def transpose(call: Call) -> fx.Node:
    before = call.shape()
    order = list(call.attribute("perm", range(len(before))[::-1]))
    moved = [axis for axis in order if before[axis] != 1]
    if moved != sorted(moved):
        raise call.refuse(f"it moves values (the axes {order} of the shape {before})")
    return call.reshaped(tuple(before[axis] for axis in order))


def squeeze(call: Call) -> fx.Node:
    axes = call.attribute("axes") or (call.constant(1, "axes").tolist() if call.has(1) else None)
    before = call.shape()
    axes = range(1, len(before)) if axes is None else [axis % len(before) for axis in axes]
    return call.reshaped(tuple(size for i, size in enumerate(before) if i not in axes or size != 1))


def unsqueeze(call: Call) -> fx.Node:
    axes = call.attribute("axes") or call.constant(1, "axes").tolist()
    after = list(call.shape())
    for axis in sorted(axis % (len(after) + len(axes)) for axis in axes):
        after.insert(axis, 1)
    return call.reshaped(tuple(after))


def identity(call: Call) -> fx.Node:
    return call.layer(nn.Identity())


OPERATORS: dict[str, Callable[[Call], fx.Node]] = {
    "Add": arithmetic(operator.add),
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "Div": arithmetic(operator.truediv),
    "Dropout": identity,
    "Flatten": flatten,
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "Identity": identity,
    "LeakyRelu": lambda call: call.layer(nn.LeakyReLU(call.attribute("alpha", 0.01))),
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": arithmetic(operator.mul),
    "Neg": lambda call: call.function(operator.neg, call.value()),
    "Relu": lambda call: call.layer(nn.ReLU()),
    "Reshape": reshape,
    "Squeeze": squeeze,
    "Sub": arithmetic(operator.sub),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
