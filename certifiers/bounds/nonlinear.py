"""The layers that need a relaxation: ReLU, LeakyReLU, MaxPool2d. The protocol is that of operations.py.

Here ``backward`` needs the Interval of the layer's input, and the rows it gives are a lower bound, no equality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .operations import Interval, total, total_terms


@dataclass(frozen=True)
class ReLU:
    """``max(x, slope * x)`` with 0 <= slope <= 1: ReLU and LeakyReLU."""

    slope: float = 0.0
    terms: ClassVar[int] = 2

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return 0  # its products and its constant are known better, see rounding.Tally.passed

    def reach(self, size: Tensor) -> Tensor:
        return size

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope) if self.slope else F.relu(x)

    def interval(self, box: Interval) -> Interval:
        return Interval.between(self.forward(box.lower), self.forward(box.upper))

    def backward(self, rows: Tensor, box: Interval, slopes: Tensor | None = None) -> tuple[tuple[Tensor], Tensor]:
        """CROWN's two lines: ``lower_slope * x <= f(x) <= upper_slope * x + intercept`` on the box.

        The upper line is the chord; the lower slope (1, or ``slope``) is the one that leaves the smaller area
        (Zhang et al. 2018, arXiv 1811.00866). Stable units come out exact. Negative coefficients take the upper
        line, the others the lower.

        ``slopes`` (samples, rows or 1, *shape) are lower slopes for the unstable units to use instead; they are cut
        to [``slope``, 1], where every one of them is sound (Xu et al. 2021, arXiv 2011.13824).
        """
        if slopes is not None:
            return _chosen_rows(rows, box.lower.unsqueeze(1), box.upper.unsqueeze(1), self.slope, slopes)
        carry = _relu_rows if torch.compiler.is_compiling() else _ReLURows.apply
        row, constant = carry(rows, box.lower.unsqueeze(1), box.upper.unsqueeze(1), self.slope)
        return (row,), constant


def _relu_lines(lower: Tensor, upper: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower slope, upper slope, the box's negative end and the width of its part around zero."""
    below, above = lower.clamp(max=0), upper.clamp(min=0)
    # Where the box is the single point 0 every slope is right.
    width = (above - below).clamp(min=torch.finfo(lower.dtype).tiny)
    upper_slope = ((above - slope * below) if slope else above) / width
    lower_slope = (upper > -lower).to(lower)
    return (lower_slope.clamp(min=slope) if slope else lower_slope), upper_slope, below, width


def _relu_rows(rows: Tensor, lower: Tensor, upper: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Rows and constant behind a ReLU, in plain arithmetic (what torch.compile fuses by itself)."""
    lower_slope, upper_slope, below, _ = _relu_lines(lower, upper, slope)
    # Zero rows are common, behind masked weights, and their gradient trains the scores: the lower line's here.
    takes_lower = rows >= 0
    constant = total(rows * torch.where(takes_lower, 0.0, below * (slope - upper_slope)))
    return rows * torch.where(takes_lower, lower_slope, upper_slope), constant


def _chosen_rows(
    rows: Tensor, lower: Tensor, upper: Tensor, slope: float, chosen: Tensor
) -> tuple[tuple[Tensor], Tensor]:
    """:func:`_relu_rows` with lower slopes chosen for the unstable units; differentiable in them."""
    crown, upper_slope, below, _ = _relu_lines(lower, upper, slope)
    lower_slope = torch.where((lower < 0) & (upper > 0), chosen.clamp(slope, 1.0), crown)
    takes_lower = rows >= 0
    constant = total(rows * torch.where(takes_lower, 0.0, below * (slope - upper_slope)))
    return (rows * torch.where(takes_lower, lower_slope, upper_slope),), constant


class _ReLURows(torch.autograd.Function):
    """:func:`_relu_rows` with its gradient written out, in place where it can be: passes over memory are the cost."""

    @staticmethod
    def forward(ctx, rows: Tensor, lower: Tensor, upper: Tensor, slope: float) -> tuple[Tensor, Tensor]:
        lower_slope, upper_slope, below, width = _relu_lines(lower, upper, slope)
        takes_lower = rows >= 0
        chosen = torch.where(takes_lower, lower_slope, upper_slope)
        intercept = torch.where(takes_lower, 0.0, (slope - upper_slope).mul_(below))
        ctx.save_for_backward(rows, chosen, upper_slope, intercept, below, width)
        ctx.slope = slope
        return rows * chosen, total(rows * intercept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows: Tensor, grad_constant: Tensor):
        rows, chosen, upper_slope, intercept, below, width = ctx.saved_tensors
        grad_constant = grad_constant.reshape(*grad_constant.shape, *[1] * (rows.dim() - 2))
        to_rows = (grad_rows * chosen).addcmul_(intercept, grad_constant)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return to_rows, None, None, None
        # upper_slope = (above - slope * below) / (above - below) and intercept = below * (slope - upper_slope).
        negative = rows.clamp(max=0)
        to_slope = torch.addcmul(grad_rows, below, grad_constant, value=-1).mul_(negative)
        to_intercept = negative.mul_(grad_constant)
        if rows.shape[1] > 1:
            to_intercept, to_slope = to_intercept.sum(1, keepdim=True), to_slope.sum(1, keepdim=True)
        to_slope.div_(width)
        to_lower = (to_slope - to_intercept).mul_(upper_slope - ctx.slope if ctx.slope else upper_slope)
        to_upper = to_slope.addcmul_(to_slope, upper_slope, value=-1)
        # Stable units have a fixed slope: `below` is 0 where active, all of the width where inactive.
        return to_rows, torch.where(below < 0, to_lower, 0.0), torch.where(below > -width, to_upper, 0.0), None


@dataclass(frozen=True)
class MaxPool2d:
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    terms: ClassVar[int] = 2

    def backward_terms(self, shape: tuple[int, ...]) -> int:
        return self.kernel[0] * self.kernel[1] + total_terms(shape)  # a pixel may win in several windows

    def reach(self, size: Tensor) -> Tensor:
        return self.forward(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def interval(self, box: Interval) -> Interval:
        return Interval.between(self.forward(box.lower), self.forward(box.upper))

    def backward(self, rows: Tensor, box: Interval) -> tuple[tuple[Tensor], Tensor]:
        """``x_j <= max <= x_j`` where input j of a window beats all others everywhere, else ``max <= max upper``.

        j is the input with the largest lower bound, so that ``x_j <= max`` always holds.
        """
        lower, upper = box.lower, box.upper
        _, winner = F.max_pool2d(
            lower, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, return_indices=True
        )
        ceiling = self.forward(upper)
        decided = self.beats_others(lower, upper, winner).unsqueeze(1)
        constant = total(torch.where(decided, 0.0, rows.clamp(max=0) * ceiling.unsqueeze(1)))
        kept = torch.where(decided | (rows >= 0), rows, 0.0)
        flat = kept.new_zeros(*kept.shape[:3], lower.shape[-2] * lower.shape[-1])
        index = winner.unsqueeze(1).expand_as(kept).flatten(3)
        return (flat.scatter_add(3, index, kept.flatten(3)).reshape(*kept.shape[:3], *lower.shape[-2:]),), constant

    def beats_others(self, lower: Tensor, upper: Tensor, winner: Tensor) -> Tensor:
        """Where the winner's lower bound is at least every other upper bound of its window."""
        height, width = lower.shape[-2:]
        position = torch.arange(height * width, device=lower.device, dtype=torch.float64)
        position = position.reshape(1, 1, height, width)
        best_other = torch.full_like(winner, float("-inf"), dtype=lower.dtype)
        for image, where in self._window_entries(upper, position, winner.shape[-2:]):
            best_other = torch.maximum(best_other, image.masked_fill(where.long() == winner, float("-inf")))
        return lower.flatten(2).gather(2, winner.flatten(2)).reshape(winner.shape) >= best_other

    def _window_entries(self, upper: Tensor, position: Tensor, size: torch.Size):
        """Each of the kernel's entries in turn: the value it reads in every window, and from which pixel."""
        extent = zip(size, self.stride, self.dilation, self.kernel, strict=True)
        spare = [(out - 1) * stride + dilation * (kernel - 1) + 1 for out, stride, dilation, kernel in extent]
        below = max(spare[0] - upper.shape[-2] - self.padding[0], 0)
        right = max(spare[1] - upper.shape[-1] - self.padding[1], 0)
        pad = (self.padding[1], right, self.padding[0], below)
        values, places = F.pad(upper, pad, value=float("-inf")), F.pad(position, pad, value=-1.0)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                top, left = i * self.dilation[0], j * self.dilation[1]
                window = (
                    ...,
                    slice(top, top + (size[0] - 1) * self.stride[0] + 1, self.stride[0]),
                    slice(left, left + (size[1] - 1) * self.stride[1] + 1, self.stride[1]),
                )
                yield values[window], places[window]


#: Operations whose bounds depend on the box of their input.
NONLINEAR = (ReLU, MaxPool2d)
