"""The supported layers: a converter for each, which makes an operation of a call in the traced graph.

A converter gets the builder, the fx node and the call's arguments, and returns the computed inputs and a function
``build(clean input value or None) -> operation``, or None for an identity. To add a layer: one converter here, a
line in the tables of spellings.py, a row in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import InputError
from .nonlinear import MaxPool2d, ReLU
from .operations import Add, AveragePool2d, Conv2d, Linear, Reshape, Scale, Select

Converted = tuple[list[fx.Node], Callable[[Tensor | None], Any] | None]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# Affine layers ------------------------------------------------------------------------------------------------


def _linear(b, node, x, weight, bias) -> Converted:
    if len(b.shape(x)) != 1:
        raise b.unsupported(node, f"a linear layer needs flat inputs (batch, features), not {b.shape(x)} per sample")
    return [x], lambda _: Linear(weight(), bias())


def linear(b, node, x, weight, bias=None) -> Converted:
    return _linear(b, node, x, b.constant(node, weight), b.constant(node, bias))


def linear_module(b, node, m, x) -> Converted:
    return _linear(b, node, x, lambda: m.weight, lambda: m.bias)


def _conv(b, node, x, weight, bias, stride, padding, dilation, groups) -> Converted:
    stride, dilation = _pair(stride), _pair(dilation)
    shape = b.shape(x)
    if len(shape) != 3:
        raise b.unsupported(node, f"a 2-d convolution needs (batch, channels, height, width), not {shape} per sample")
    if padding == "valid":
        padding = 0
    if padding == "same":
        spread = [d * (k - 1) for d, k in zip(dilation, weight().shape[-2:], strict=True)]
        if any(s % 2 for s in spread):
            raise b.unsupported(node, "padding='same' with an even kernel pads unevenly; give the padding in numbers")
        padding = tuple(s // 2 for s in spread)
    padding = _pair(padding)
    return [x], lambda _: Conv2d(weight(), bias(), stride, padding, dilation, groups, shape[-2:])


def conv_function(b, node, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Converted:
    return _conv(b, node, x, b.constant(node, weight), b.constant(node, bias), stride, padding, dilation, groups)


def conv_module(b, node, m, x) -> Converted:
    if m.padding_mode != "zeros":
        raise b.unsupported(node, f"padding_mode '{m.padding_mode}' is not known, only 'zeros'")
    return _conv(b, node, x, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.dilation, m.groups)


def normalisation(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    """BatchNorm as one scale and one shift by channel."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def _normalise(mean, var, weight, bias, eps: float, dims: int) -> Scale:
    """BatchNorm as one scale and shift, shaped to broadcast against one sample."""
    scale, shift = normalisation(mean, var, weight, bias, eps)
    moved = (mean * scale).abs()
    parts = moved if bias is None else moved + bias.abs()
    shape = (-1,) + (1,) * (dims - 1)
    return Scale(scale.reshape(shape), shift.reshape(shape), parts.reshape(shape))


def batch_norm_module(b, node, m, x) -> Converted:
    dims = len(b.shape(x))

    def build(value: Tensor | None) -> Scale:
        if not (m.training or m.running_mean is None):
            return _normalise(m.running_mean, m.running_var, m.weight, m.bias, m.eps, dims)
        if value is None:
            raise InputError(
                f"BatchNorm '{node.target}' is in training mode and needs the clean batch for its statistics: "
                f"call model.eval() before bounding, or bind the graph to the clean inputs."
            )
        mean, var, count = _batch_statistics(m, value)
        update_running(m, mean.detach(), var.detach(), count)
        return _normalise(mean, var, m.weight, m.bias, m.eps, dims)

    return [x], build


class BatchStatistics:
    """To inherit from it is a promise: the layer is torch's BatchNorm but for where its statistics come from while it
    trains (from all processes, say). A BatchNorm with any other forward pass of its own has no bounds."""

    def batch_statistics(self, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance by channel, and of how many numbers."""
        raise NotImplementedError


def _batch_statistics(m: nn.Module, value: Tensor) -> tuple[Tensor, Tensor, int]:
    if m.training and isinstance(m, BatchStatistics):
        return m.batch_statistics(value)
    axes = [0, *range(2, value.dim())]
    return value.mean(axes), value.var(axes, unbiased=False), value.numel() // value.shape[1]


@torch.no_grad()
def update_running(m: nn.Module, mean: Tensor, var: Tensor, count: int) -> None:
    """What nn.BatchNorm's forward does to its running statistics (unbiased variance)."""
    if m.running_mean is None or not m.training:
        return
    m.num_batches_tracked.add_(1)
    rate = 1.0 / m.num_batches_tracked if m.momentum is None else m.momentum
    m.running_mean.lerp_(mean.to(m.running_mean), rate)
    m.running_var.lerp_((var * (count / max(count - 1, 1))).to(m.running_var), rate)


def batch_norm(
    b, node, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Converted:
    if training is not False or running_mean is None:
        raise b.unsupported(node, "F.batch_norm in training mode: use nn.BatchNorm1d/2d or call model.eval()")
    mean, var, weight, bias = (b.constant(node, a) for a in (running_mean, running_var, weight, bias))
    dims = len(b.shape(x))
    return [x], lambda _: _normalise(mean(), var(), weight(), bias(), eps, dims)


def _pool_matrix(pool: Callable[[Tensor], Tensor], size: int, like: Tensor | None) -> Tensor:
    """The matrix (out, in) of a 1-d average pooling."""
    dtype, device = (torch.get_default_dtype(), None) if like is None else (like.dtype, like.device)
    return pool(torch.eye(size, dtype=torch.float64).unsqueeze(0))[0].T.to(device=device, dtype=dtype).contiguous()


def _average(b, node, x, pools: list[Callable[[Tensor], Tensor]]) -> Converted:
    height, width = b.shape(x)[-2:]
    like = b.runs[0].values[node]
    rows, columns = _pool_matrix(pools[0], height, like), _pool_matrix(pools[1], width, like)
    return [x], lambda _: AveragePool2d(rows, columns)


def avg_pool(
    b, node, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Converted:
    if divisor_override is not None:
        raise b.unsupported(node, "divisor_override is not known")
    kernel = _pair(kernel_size)
    stride, padding = kernel if stride in (None, []) else _pair(stride), _pair(padding)
    return _average(
        b,
        node,
        x,
        [
            lambda v, i=i: F.avg_pool1d(v, kernel[i], stride[i], padding[i], ceil_mode, count_include_pad)
            for i in (0, 1)
        ],
    )


def adaptive_avg_pool(b, node, x, output_size) -> Converted:
    sizes = [s or n for s, n in zip(_pair(output_size), b.shape(x)[-2:], strict=True)]
    return _average(b, node, x, [lambda v, s=s: F.adaptive_avg_pool1d(v, s) for s in sizes])


# Nonlinear layers ---------------------------------------------------------------------------------------------


def relu(b, node, x, inplace=False) -> Converted:
    return [x], lambda _: ReLU()


def leaky_relu(b, node, x, negative_slope=0.01, inplace=False) -> Converted:
    slope = float(negative_slope)
    if not 0 <= slope <= 1:
        raise b.unsupported(node, f"a negative slope of {slope} makes LeakyReLU non-convex; it must lie in [0, 1]")
    return [x], lambda _: ReLU(slope)


def max_pool(
    b, node, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Converted:
    if return_indices:
        raise b.unsupported(node, "return_indices is not known")
    if len(b.shape(x)) != 3:
        raise b.unsupported(node, f"max pooling needs (batch, channels, height, width), not {b.shape(x)} per sample")
    kernel = _pair(kernel_size)
    stride = kernel if stride in (None, []) else _pair(stride)
    pool = MaxPool2d(kernel, stride, _pair(padding), _pair(dilation), ceil_mode)
    return [x], lambda _: pool


# Shapes and arithmetic ----------------------------------------------------------------------------------------


def reshape(b, node, x, *_, **__) -> Converted:
    before, after = (b.runs[0].values[n].dtype for n in (x, node))
    if before != after:
        raise b.unsupported(node, f"it reads the bits of {before} as {after}")
    reshape = Reshape(b.shape(x), b.shape(node))
    return [x], (None if reshape.before == reshape.after else lambda _: reshape)


def index_select(b, node, x, dim, index) -> Converted:
    if dim not in (1, -1) or len(b.shape(x)) != 1:
        raise b.unsupported(node, f"only features of flat inputs (batch, features) can be selected, not dim {dim}")
    index, before = b.constant(node, index), b.shape(x)[0]
    twice = b.unsupported(node, "it reads a feature twice")

    def build(_: Tensor | None) -> Select:
        places = index()
        if len(places.unique()) != len(places):  # an l2 ball of repeated coordinates is no ball
            raise twice
        return Select(places, before)

    build(None)
    return [x], build


def identity(b, node, x, *_, **__) -> Converted:
    return [x], None


def dropout(b, node, x, p=0.5, training=False, inplace=False) -> Converted:
    if training and p:
        raise b.unsupported(node, "dropout is switched on; bounds are for the network that is used: p=0 or eval()")
    return [x], None


def dropout_module(b, node, m, x) -> Converted:
    return dropout(b, node, x, m.p, m.training)


def _scale(b, node, x, scale: Callable[[], Any], shift: Callable[[], Any]) -> Converted:
    shape = b.shape(x)
    if b.shape(node) != shape:
        raise b.unsupported(node, f"broadcasting changes the shape from {shape} to {b.shape(node)}")

    def per_sample(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == len(shape) + 1:
            return value.squeeze(0)
        return value

    for value in (scale(), shift()):
        if isinstance(value, Tensor) and (value.dim() > len(shape) + 1 or value.dim() > len(shape) and len(value) > 1):
            raise b.unsupported(node, "the constant differs between the samples of a batch")
    return [x], lambda _: Scale(per_sample(scale()), per_sample(shift()))


def sum_or_difference(sign: float):
    def convert(b, node, a, other, *, alpha=1) -> Converted:
        if alpha != 1:
            raise b.unsupported(node, "alpha is not known")
        if b.is_computed(a) and b.is_computed(other):
            if b.shape(a) != b.shape(other):
                raise b.unsupported(node, f"the two sides differ in shape: {b.shape(a)} and {b.shape(other)}")
            return [a, other], lambda _: Add(sign)
        if b.is_computed(a):
            value = b.constant(node, other)
            return _scale(b, node, a, lambda: 1.0, lambda: sign * value())
        value = b.constant(node, a)
        return _scale(b, node, other, lambda: sign, value)

    return convert


def multiply(b, node, a, other) -> Converted:
    if b.is_computed(a) and b.is_computed(other):
        raise b.unsupported(node, "a product of two computed values is not linear")
    x, value = (a, other) if b.is_computed(a) else (other, a)
    return _scale(b, node, x, b.constant(node, value), lambda: 0.0)


def divide(b, node, a, other, *, rounding_mode=None) -> Converted:
    if rounding_mode is not None or b.is_computed(other):
        raise b.unsupported(node, "only division by a constant is linear")
    value = b.constant(node, other)
    dtype = b.runs[0].values[node].dtype

    def reciprocal() -> Any:
        divisor = value()
        return divisor.to(dtype).reciprocal() if isinstance(divisor, Tensor) else 1 / divisor

    return _scale(b, node, a, reciprocal, lambda: 0.0)


def negate(b, node, x) -> Converted:
    return _scale(b, node, x, lambda: -1.0, lambda: 0.0)
