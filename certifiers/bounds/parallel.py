"""Relaxations with one slope: ``f(x) = L x + offset`` up to an error of at most ``radius``, L the same on both sides.

This is the relaxation of Fast-Lin (Weng et al. 2018), DeepZ (Singh et al. 2018) and Neurify (Wang et al. 2018): one
linear map bounds from both sides, so a single pass, forward or backward, gives a value's lower and upper bound.
Looser than CROWN's two lines at equal boxes, but half the work, and the error is a number per unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .nonlinear import MaxPool2d, ReLU
from .operations import Interval


class Slopes(NamedTuple):
    """A ReLU on a box: ``slope * x + radius``, plus or minus ``radius``; each ``(batch, *shape)``."""

    slope: Tensor
    radius: Tensor

    def centre(self, x: Tensor) -> Tensor:
        """The middle of the outputs where the input is ``x`` (batch, *shape)."""
        return self.slope * x + self.radius

    def forward(self, values: Tensor, samples: Tensor | None = None) -> Tensor:
        """The linear map on directions, ``(batch or 1, directions, *shape)``; with ``samples``, one each."""
        return values * (self.slope.unsqueeze(1) if samples is None else self.slope[samples])

    def backward(self, rows: Tensor) -> Tensor:
        """Rows behind the layer, ``(batch or 1, rows, *shape)``, in front of it, ``(batch, rows, *shape)``."""
        return rows * self.slope.unsqueeze(1)


class Winners(NamedTuple):
    """A max pooling on a box: where one input beats its window everywhere, that input; else a constant.

    ``index``: flat places of the winners in the input's plane; ``decided``, ``middle``, ``radius``: of each window,
    all ``(batch, channels, *out)``; ``size``: the input's plane.
    """

    index: Tensor
    decided: Tensor
    middle: Tensor
    radius: Tensor
    size: torch.Size

    def centre(self, x: Tensor) -> Tensor:
        won = x.flatten(-2).gather(-1, self.index.flatten(-2)).view_as(self.index)
        return torch.where(self.decided, won, self.middle)

    def forward(self, values: Tensor, samples: Tensor | None = None) -> Tensor:
        index, decided = self._of(values, samples)
        won = values.flatten(-2).expand(*index.shape[:-2], -1).gather(-1, index.flatten(-2)).view_as(index)
        return won * decided

    def backward(self, rows: Tensor) -> Tensor:
        index, decided = self._of(rows, None)
        kept = (rows * decided).flatten(-2)
        flat = kept.new_zeros(*kept.shape[:-1], self.size.numel())
        return flat.scatter_add(-1, index.flatten(-2), kept).unflatten(-1, self.size)

    def _of(self, values: Tensor, samples: Tensor | None) -> tuple[Tensor, Tensor]:
        if samples is not None:
            return self.index[samples], self.decided[samples]
        return tuple(p.unsqueeze(1).expand(-1, values.shape[1], -1, -1, -1) for p in (self.index, self.decided))


def relaxation(operation: ReLU | MaxPool2d, box: Interval) -> Slopes | Winners:
    """The one-slope relaxation of a layer whose input lies in ``box``.

    ReLU: slope ``u / (u - l)`` and error ``-u l / (u - l)`` in all where ``l < 0 < u``; exact elsewhere. LeakyReLU
    alike. Max pooling: see :class:`Winners`.
    """
    if isinstance(operation, ReLU):
        return _slopes(box, operation.slope)
    lower, upper = box.lower, box.upper
    _, index = torch.nn.functional.max_pool2d(
        lower,
        operation.kernel,
        operation.stride,
        operation.padding,
        operation.dilation,
        operation.ceil_mode,
        return_indices=True,
    )
    decided = operation.beats_others(lower, upper, index)
    least, most = operation.forward(lower), operation.forward(upper)
    radius = torch.where(decided, 0.0, (most - least) / 2)
    return Winners(index, decided, (least + most) / 2, radius, lower.shape[-2:])


def _slopes(box: Interval, leak: float) -> Slopes:
    below, above = box.lower.clamp(max=0), box.upper.clamp(min=0)
    # Where the box is the single point 0 every slope is right.
    width = (above - below).clamp(min=torch.finfo(below.dtype).tiny)
    slope = above / width
    radius = -0.5 * (1 - leak) * slope * below
    return Slopes(leak + (1 - leak) * slope if leak else slope, radius)
