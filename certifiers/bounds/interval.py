"""Interval bound propagation (IBP; Gowal et al. 2018, arXiv 1810.12715): centre and radius through every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import rounding
from .graph import Network
from .operations import Conv2d, Interval, Linear, Reshape, Scale, Select
from .region import Region


class Intervals(NamedTuple):
    """The box of every node's output over a region, in the network's order, and which are the best possible.

    ``exact[i]``: node i is one linear layer of the input (reshapes, scalings and selections aside), where interval
    arithmetic is already exact and no other method can do better. ``reach``: where rounding is accounted for (see
    rounding.py), of every node; else None.
    """

    region: Region
    boxes: list[Interval]
    exact: list[bool]
    reach: list[Tensor] | None = None

    def replace(self, place: int, box: Interval) -> Intervals:
        boxes = list(self.boxes)
        boxes[place] = box
        if self.reach is None:
            return self._replace(boxes=boxes)
        reach = list(self.reach)
        reach[place] = torch.maximum(reach[place], rounding.size(box))
        return self._replace(boxes=boxes, reach=reach)

    def refresh(self, network: Network, place: int) -> Intervals:
        """With the box that interval arithmetic makes of the boxes before ``place`` as they are now."""
        inputs = [self.boxes[i] for i in network.nodes[place].inputs]
        box = network.operations[place].interval(*inputs)
        if self.reach is None:
            return self.replace(place, box)
        box, size = rounding.widened(network.operations[place], box, inputs)
        reach = [*self.reach[:place], size, *self.reach[place + 1 :]]
        return self._replace(reach=reach).replace(place, box)

    def between(self, lower: Tensor, upper: Tensor) -> Interval:
        """A box of these ends, which are bounds that hold."""
        return (Interval if self.reach is None else rounding).between(lower, upper)

    def select(self, samples: Tensor) -> Intervals:
        """Of these samples (indices, repeats allowed)."""
        boxes = [Interval(box.centre[samples], box.radius[samples]) for box in self.boxes]
        reach = None if self.reach is None else [size[samples] for size in self.reach]
        return Intervals(self.region.select(samples), boxes, self.exact, reach)

    def tally(self, network: Network, samples: Tensor | None = None) -> rounding.Tally | None:
        """An account of the rounding in one backward pass, where it is wanted."""
        return None if self.reach is None else rounding.Tally(network.operations, self.reach, samples)


def propagate(network: Network, region: Region, account_for_rounding: bool = False) -> Intervals:
    """Boxes of all nodes: for every input in the region each node's value lies in its box (exact arithmetic).

    With ``account_for_rounding`` (the region then too: ``Region.of(..., True)``) that holds although they
    are computed in floating point, and so do all bounds that are made from them.
    """
    boxes, exact = [region.box], [True]
    reach = [rounding.size(region.box)] if account_for_rounding else None
    # Nodes reached from the input by scalings, reshapes and selections only; under an l2 threat with the ball as
    # they see it: its centre, and how far each coordinate can move.
    raw = [True]
    balls: list[_Ball | None] = [_ball(region, account_for_rounding)]
    for node, operation in zip(network.nodes[1:], network.operations[1:], strict=True):
        first = node.inputs[0]
        box = operation.interval(*(boxes[i] for i in node.inputs))
        diagonal = isinstance(operation, (Scale, Reshape, Select))
        linear = isinstance(operation, (Linear, Conv2d))
        if linear and balls[first] is not None:
            box = _meet_ball(box, operation, balls[first])
        if reach is not None:
            box, size = rounding.widened(operation, box, [boxes[i] for i in node.inputs])
            reach.append(size)
        boxes.append(box)
        raw.append(diagonal and raw[first])
        exact.append((diagonal and exact[first]) or (linear and raw[first]))
        balls.append(balls[first].through(operation) if diagonal and balls[first] is not None else None)
    return Intervals(region, boxes, exact, reach)


class _Ball(NamedTuple):
    """An l2 ball as a node sees it: its centre, how far each coordinate can move, and (where rounding is accounted
    for) how far each centre may be off."""

    reach: Interval
    blur: Tensor | None

    def through(self, operation: Scale | Reshape) -> _Ball:
        moved = operation.interval(self.reach)
        if self.blur is None:
            return _Ball(moved, None)
        off = operation.interval(Interval(torch.zeros_like(self.blur), self.blur)).radius
        lost = rounding.gamma(operation.terms, off.dtype) * operation.reach(rounding.size(self.reach))
        return _Ball(moved, off + lost)


def _ball(region: Region, account_for_rounding: bool) -> _Ball | None:
    if region.x is None:
        return None
    eps = region.eps
    if isinstance(eps, torch.Tensor) and eps.dim():
        eps = eps.view(-1, *[1] * (region.x.dim() - 1))
    around = Interval(region.x, torch.ones_like(region.x) * eps)
    return _Ball(around, torch.zeros_like(region.x) if account_for_rounding else None)


def _meet_ball(box: Interval, layer: Linear | Conv2d, ball: _Ball) -> Interval:
    """Cut the first linear layer's box to what the l2 ball allows: ``W x +- ||W diag(reach)||_2`` (dual norm)."""
    centre, radius = layer.forward(ball.reach.centre), layer.norm(ball.reach.radius)
    if ball.blur is not None:
        radius = radius + layer.interval(Interval(torch.zeros_like(ball.blur), ball.blur)).radius
    lower = torch.maximum(box.lower, centre - radius)
    return Interval.between(lower, torch.minimum(box.upper, centre + radius).maximum(lower))
