"""CROWN with optimised slopes (alpha-CROWN; Xu et al. 2021, arXiv 2011.13824) on our own backward pass.

The line below an unstable ReLU may have any slope from 0 to 1, and each bound may choose its own. Here every margin
that is asked about ascends by Adam from CROWN's slopes, with the boxes before the nonlinear layers held fixed. Where
that does not settle a margin, those boxes are first made smaller in the same way, layer by layer, each unit's ends by
slopes of their own; that is where most of the gain lies, and where the time goes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .graph import Network, nonlinear_places
from .interval import Intervals
from .linear import lower_bounds
from .margins import chosen_rows, spread_chosen
from .nonlinear import ReLU
from .operations import Interval


@dataclass(frozen=True)
class Ascent:
    """How slopes are optimised.

    ``iterations``: for a margin, ``unit_iterations``: for the ends of a unit's box. ``rate``: Adam's first step size,
    multiplied by ``decay`` after each step. ``memory_mb``: about how much one group of rows may take.
    ``deadline``: the moment (time.monotonic) after which no step begins; what was found until then counts.
    """

    iterations: int = 20
    unit_iterations: int = 10
    rate: float = 0.25
    decay: float = 0.95
    memory_mb: float = 512
    deadline: float | None = None

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def alpha_margins(
    network: Network, intervals: Intervals, y: Tensor, classes: Tensor, ascent: Ascent = Ascent()
) -> Tensor:
    """Margins by CROWN with optimised slopes, ``(batch, classes)``; -inf where ``classes`` (batch, classes) is False.

    ``intervals``: of :func:`~certifiers.bounds.linear.crown_intervals`. First with the boxes as they are; then, for
    the samples that have a margin left that is not positive, with optimised boxes. Never below CROWN.
    """
    rows, samples, wrong = chosen_rows(y, classes, intervals.region.box.centre)
    last = len(network.nodes) - 1
    found = optimised_bounds(network, last, rows, samples, intervals, ascent, ascent.iterations, target=0.0)
    open_ = ~(found > 0)
    if open_.any() and not ascent.late:
        left = samples[open_].unique()
        place = torch.full_like(y, -1).index_put((left,), torch.arange(len(left), device=y.device))
        smaller = optimised_intervals(network, intervals.select(left), ascent)
        again = optimised_bounds(
            network, last, rows[open_], place[samples[open_]], smaller, ascent, ascent.iterations, target=0.0
        )
        found[open_] = torch.maximum(found[open_], again)
    return spread_chosen(found, samples, wrong, y, classes)


def optimised_bounds(
    network: Network,
    place: int,
    rows: Tensor,
    samples: Tensor,
    intervals: Intervals,
    ascent: Ascent,
    iterations: int,
    target: float = torch.inf,
) -> Tensor:
    """Lower bounds of ``rows . value of node place`` with slopes optimised for each row, ``(len(samples),)``.

    Never below CROWN's own bound on the same boxes, which is where the ascent starts. Every bound it passes is sound,
    and the best of each row is returned.

    Args:
        rows: ``(len(samples), *shape)``, each about the sample of the same place in ``samples``.
        target: a row whose bound exceeds it is left alone from then on.
    """
    size = sum(prod(node.shape) for node in network.nodes[: place + 1])
    # Each node's row and its gradient, and three tensors of the slopes' size, are alive at once.
    group = max(int(ascent.memory_mb * 2**20 / (6 * size * rows.element_size())), 1)
    parts = [
        _ascend(network, place, some, which, intervals, ascent, iterations, target)
        for some, which in zip(rows.split(group), samples.split(group), strict=True)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0)


def _ascend(network, place, rows, samples, intervals, ascent, iterations, target) -> Tensor:
    begun = _crown_slopes(network, place, samples, intervals)
    best = rows.new_full((len(rows),), -torch.inf)
    left, state = torch.arange(len(rows), device=rows.device), _Adam(begun)
    for step in range(iterations + 1):
        last = step == iterations or (step > 0 and ascent.late) or not begun
        with torch.set_grad_enabled(not last):
            slopes = {i: value.requires_grad_(not last) for i, value in state.slopes.items()}
            bounds = lower_bounds(network, place, rows[left].unsqueeze(1), intervals, samples[left], slopes).squeeze(1)
        best[left] = torch.maximum(best[left], bounds.detach())  # NaN stays NaN: it proves nothing
        if last:
            break
        keep = ~(best[left] > target)
        gradients = torch.autograd.grad(bounds, list(slopes.values()), torch.ones_like(bounds), allow_unused=True)
        state.step(dict(zip(slopes, gradients, strict=True)), ascent.rate * ascent.decay**step)
        if not keep.all():
            left, state = left[keep], state.select(keep)
        if len(left) == 0:
            break
    return best


def _crown_slopes(network: Network, place: int, samples: Tensor, intervals: Intervals) -> dict[int, Tensor]:
    """CROWN's lower slopes of every ReLU before ``place`` that has an unstable unit, ``(len(samples), 1, *shape)``."""
    slopes = {}
    for i in nonlinear_places(network):
        if i >= place or not isinstance(network.operations[i], ReLU):
            continue
        box = intervals.boxes[network.nodes[i].inputs[0]]
        lower, upper = box.lower[samples].unsqueeze(1), box.upper[samples].unsqueeze(1)
        if ((lower < 0) & (upper > 0)).any():
            slopes[i] = (upper > -lower).to(lower).clamp(min=network.operations[i].slope)
    return slopes


class _Adam:
    """Adam's ascent on slopes in [0, 1]; each entry moves by itself, so rows can leave at any time."""

    def __init__(self, slopes: dict[int, Tensor]):
        self.slopes = slopes
        self.mean = {i: torch.zeros_like(value) for i, value in slopes.items()}
        self.square = {i: torch.zeros_like(value) for i, value in slopes.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: dict[int, Tensor | None], rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.steps += 1
        for i, gradient in gradients.items():
            if gradient is None:
                continue
            mean = self.mean[i].lerp_(gradient, 1 - betas[0]) / (1 - betas[0] ** self.steps)
            square = self.square[i].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            length = (square / (1 - betas[1] ** self.steps)).sqrt().add_(1e-12)
            self.slopes[i] = self.slopes[i].detach().addcdiv(mean, length, value=rate).clamp_(0.0, 1.0)

    def select(self, keep: Tensor) -> _Adam:
        chosen = _Adam({i: value.detach()[keep] for i, value in self.slopes.items()})
        chosen.mean = {i: value[keep] for i, value in self.mean.items()}
        chosen.square = {i: value[keep] for i, value in self.square.items()}
        chosen.steps = self.steps
        return chosen


def optimised_intervals(network: Network, intervals: Intervals, ascent: Ascent) -> Intervals:
    """Boxes before the nonlinear layers made smaller by optimised slopes, in one sweep forward; never larger.

    ``intervals``: of :func:`~certifiers.bounds.linear.crown_intervals`. Units that are stable already stay, and so
    does a layer with no unstable ReLU before it, where slopes have nothing to choose.
    """
    for place in nonlinear_places(network):
        (before,) = network.nodes[place].inputs
        behind = [i for i in nonlinear_places(network) if i < before]
        if not behind or intervals.exact[before] or ascent.late or not isinstance(network.operations[place], ReLU):
            continue
        box = _refresh(network, before, intervals)
        samples, units = ((box.lower < 0) & (box.upper > 0)).flatten(1).nonzero(as_tuple=True)
        if len(samples):
            box = _optimised_box(network, before, box, samples, units, intervals, ascent)
        intervals = intervals.replace(before, box)
    return intervals


def _refresh(network: Network, place: int, intervals: Intervals) -> Interval:
    """The box of a node cut to what interval arithmetic makes of the (smaller) boxes before it."""
    new = intervals
    for i in range(1, place + 1):
        box, old = new.refresh(network, i).boxes[i], intervals.boxes[i]
        lower, upper = torch.maximum(box.lower, old.lower), torch.minimum(box.upper, old.upper)
        new = new.replace(i, new.between(lower, torch.maximum(lower, upper)))  # rounding may turn a point inside out
    return new.boxes[place]


def _optimised_box(network, place, box, samples, units, intervals, ascent) -> Interval:
    shape = network.nodes[place].shape
    one_hot = box.centre.new_zeros(len(samples), prod(shape)).scatter(1, units.unsqueeze(1), 1.0)
    one_hot = one_hot.unflatten(1, shape)
    ends: list[Tensor] = []
    for sign, end in ((1.0, box.lower), (-1.0, box.upper)):
        found = sign * optimised_bounds(
            network, place, sign * one_hot, samples, intervals, ascent, ascent.unit_iterations, target=0.0
        )
        flat = end.flatten(1)
        old = flat[samples, units]
        better = torch.maximum(old, found) if sign > 0 else torch.minimum(old, found)
        ends.append(flat.index_put((samples, units), torch.where(found.isfinite(), better, old)).reshape(end.shape))
    return intervals.between(ends[0], torch.maximum(*ends))
