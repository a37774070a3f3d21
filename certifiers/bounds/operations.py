"""What every affine layer does to values, to intervals and, backwards, to linear rows (nonlinear.py: the others).

An operation holds concrete tensors (the effective weights of one step) and no state. Shapes: values are
``(batch, *shape)``; rows are ``(samples, rows, *shape)``, the coefficients of linear lower bounds. Each has

``forward(*values)``
    the layer itself;
``linear(*values)``
    affine layers only: the same without its constants, so of directions and not of points;
``interval(*boxes)``
    a sound box of the outputs for inputs anywhere in the boxes (interval arithmetic, centre and radius);
``backward(rows, box)``
    for ``rows . output >= sum_i rows_i . input_i + constant`` everywhere in the boxes: the coefficients of
    each input, ``(samples, rows, *shape)``, and the constant, ``(samples, rows)``. Affine layers are exact and
    ignore ``box``; for the others ``box`` is the Interval of their input, of the same samples;
``reach(*sizes)``, ``terms``, ``backward_terms(shape)``
    for rounding.py: the sum of the absolute values that an output is made of, for inputs no larger than ``sizes``;
    of how many terms an output is the sum at most; of how many terms a coefficient or the constant that ``backward``
    gives is, for an output of ``shape`` (0: rows are passed on as they are).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


class Interval:
    """A box by centre and radius, both ``(batch, *shape)``; its ends are computed once, when first asked for."""

    __slots__ = ("_lower", "_upper", "centre", "radius")

    def __init__(self, centre: Tensor, radius: Tensor):
        self.centre, self.radius = centre, radius
        self._lower: Tensor | None = None
        self._upper: Tensor | None = None

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = self.centre - self.radius
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = self.centre + self.radius
        return self._upper

    @staticmethod
    def between(lower: Tensor, upper: Tensor) -> Interval:
        return Interval((lower + upper) / 2, (upper - lower) / 2)


def total(rows: Tensor) -> Tensor:
    """Sum over everything but samples and rows: ``(samples, rows, *shape)`` to ``(samples, rows)``.

    In two steps, so that no sum has more than :func:`total_terms` terms.
    """
    return (rows.flatten(3).sum(3) if rows.dim() > 3 else rows).sum(2)


def total_terms(shape: tuple[int, ...]) -> int:
    """How many roundings a :func:`total` over ``shape`` may gather."""
    return shape[0] + prod(shape[1:])


def _fold(function, rows: Tensor) -> Tensor:
    """Apply a batched function to rows as if rows were one long batch."""
    out = function(rows.flatten(0, 1))
    return out.unflatten(0, rows.shape[:2])


def _absolute(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


def _root(squares: Tensor) -> Tensor:
    """The square root, rounded up by next to nothing: its gradient at 0 (rows of zeros, eps 0) is finite."""
    return (squares + torch.finfo(squares.dtype).tiny).sqrt()


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None

    @property
    def terms(self) -> int:
        return self.weight.shape[1] + 1

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return self.weight.shape[0]

    def reach(self, size: Tensor) -> Tensor:
        return F.linear(size, self.weight.abs(), _absolute(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), F.linear(box.radius, self.weight.abs()))

    def norm(self, radius: Tensor) -> Tensor:
        """The l2 norm of every output's row, inputs scaled by ``radius`` (dual norm of an l2 ball)."""
        return _root(F.linear(radius.square(), self.weight.square()))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], Tensor | float]:
        constant = 0.0 if self.bias is None else rows @ self.bias
        return (rows @ self.weight,), constant


@dataclass(frozen=True)
class Conv2d:
    weight: Tensor  # (out, in / groups, height, width)
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, int]

    @property
    def terms(self) -> int:
        return self.weight[0].numel() + 1

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        outputs, _, *kernel = self.weight.shape
        # So many windows of one output channel read the same pixel.
        steps = [stride // gcd(stride, gap) for stride, gap in zip(self.stride, self.dilation, strict=True)]
        windows = [-(-size // step) for size, step in zip(kernel, steps, strict=True)]
        constant = 0 if self.bias is None else total_terms(shape)
        return max(outputs // self.groups * windows[0] * windows[1], constant)

    def reach(self, size: Tensor) -> Tensor:
        return self._convolve(size, self.weight.abs(), _absolute(self.bias))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)

    def linear(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), self._convolve(box.radius, self.weight.abs()))

    def norm(self, radius: Tensor) -> Tensor:
        return _root(self._convolve(radius.square(), self.weight.square()))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], Tensor | float]:
        # The transpose of a strided convolution forgets how many border pixels were never read.
        unread = [
            size - ((out - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, out, stride, pad, dilation, kernel in zip(
                self.input_size,
                rows.shape[-2:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[-2:],
                strict=True,
            )
        ]

        def transpose(batch: Tensor) -> Tensor:
            return F.conv_transpose2d(
                batch, self.weight, None, self.stride, self.padding, unread, self.groups, self.dilation
            )

        constant = 0.0 if self.bias is None else rows.sum((-1, -2)) @ self.bias
        return (_fold(transpose, rows),), constant


@dataclass(frozen=True)
class Scale:
    """``scale * x + shift``, elementwise: normalisation, BatchNorm at fixed statistics, constants.

    ``parts``: the sum of the absolute values that ``shift`` was computed from; None: it was given.
    """

    scale: Tensor | float  # tensors broadcast against (*shape)
    shift: Tensor | float
    parts: Tensor | None = None
    terms: ClassVar[int] = 8  # the scale of BatchNorm is a rounded square root, quotient and product

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return self.terms + total_terms(shape)

    def reach(self, size: Tensor) -> Tensor:
        return size * abs(self.scale) + (abs(self.shift) if self.parts is None else self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def linear(self, x: Tensor) -> Tensor:
        return x * self.scale

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), box.radius * abs(self.scale))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], Tensor | float]:
        shifted = isinstance(self.shift, Tensor) or self.shift != 0
        return (rows * self.scale,), total(rows * self.shift) if shifted else 0.0


@dataclass(frozen=True)
class AveragePool2d:
    """Every 2-d average pooling is separable: ``rows @ image @ columns.T`` with non-negative matrices."""

    rows: Tensor  # (out height, height)
    columns: Tensor  # (out width, width)

    @property
    def terms(self) -> int:
        return sum(self.rows.shape) + sum(self.columns.shape)

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return self.terms

    def reach(self, size: Tensor) -> Tensor:
        return self.forward(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T

    linear = forward

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), self.forward(box.radius))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], float]:
        return (self.rows.T @ rows @ self.columns,), 0.0


@dataclass(frozen=True)
class Reshape:
    before: tuple[int, ...]
    after: tuple[int, ...]
    terms: ClassVar[int] = 0

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return 0

    def reach(self, size: Tensor) -> Tensor:
        return self.forward(size)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.after)

    linear = forward

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), self.forward(box.radius))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], float]:
        return (rows.reshape(*rows.shape[:2], *self.before),), 0.0


@dataclass(frozen=True)
class Select:
    """Some of the features of a flat input, each at most once, in any order: ``x[:, index]``."""

    index: Tensor  # (features,)
    before: int
    terms: ClassVar[int] = 0

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return 0

    def reach(self, size: Tensor) -> Tensor:
        return self.forward(size)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    linear = forward

    def interval(self, box: Interval) -> Interval:
        return Interval(self.forward(box.centre), self.forward(box.radius))

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor], float]:
        return (rows.new_zeros(*rows.shape[:2], self.before).index_add(2, self.index, rows),), 0.0


@dataclass(frozen=True)
class Add:
    """``a + sign * b`` of two computed tensors of one shape (residual connections)."""

    sign: float = 1.0
    terms: ClassVar[int] = 2

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return 0  # both sides take the rows as they are

    def reach(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + self.sign * b

    linear = forward

    def interval(self, a: Interval, b: Interval) -> Interval:
        return Interval(a.centre + self.sign * b.centre, a.radius + b.radius)

    def backward(self, rows: Tensor, box: Interval | None = None) -> tuple[tuple[Tensor, Tensor], float]:
        return (rows, self.sign * rows), 0.0
