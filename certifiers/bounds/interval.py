"""Interval bound propagation (IBP; Gowal et al. 2018, arXiv 1810.12715): centre and radius through every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .graph import Network
from .operations import Conv2d, Interval, Linear, Reshape, Scale, Select
from .region import Region


class Intervals(NamedTuple):
    """The box of every node's output over a region, in the network's order, and which are the best possible.

    ``exact[i]``: node i is one linear layer of the input (reshapes, scalings and selections aside), where interval
    arithmetic is already exact and no other method can do better.
    """

    region: Region
    boxes: list[Interval]
    exact: list[bool]

    def replace(self, place: int, box: Interval) -> Intervals:
        boxes = list(self.boxes)
        boxes[place] = box
        return Intervals(self.region, boxes, self.exact)


def propagate(network: Network, region: Region) -> Intervals:
    """Boxes of all nodes: for every input in the region each node's value lies in its box (exact arithmetic)."""
    boxes, exact = [region.box], [True]
    # Nodes reached from the input by scalings, reshapes and selections only; under an l2 threat with the ball as
    # they see it: its centre, and how far each coordinate can move.
    raw = [True]
    balls: list[Interval | None] = [_ball(region)]
    for node, operation in zip(network.nodes[1:], network.operations[1:], strict=True):
        first = node.inputs[0]
        box = operation.interval(*(boxes[i] for i in node.inputs))
        diagonal = isinstance(operation, (Scale, Reshape, Select))
        linear = isinstance(operation, (Linear, Conv2d))
        if linear and balls[first] is not None:
            box = _meet_ball(box, operation, balls[first])
        boxes.append(box)
        raw.append(diagonal and raw[first])
        exact.append((diagonal and exact[first]) or (linear and raw[first]))
        balls.append(operation.interval(balls[first]) if diagonal and balls[first] is not None else None)
    return Intervals(region, boxes, exact)


def _ball(region: Region) -> Interval | None:
    if region.x is None:
        return None
    eps = region.eps
    if isinstance(eps, torch.Tensor) and eps.dim():
        eps = eps.view(-1, *[1] * (region.x.dim() - 1))
    return Interval(region.x, torch.ones_like(region.x) * eps)


def _meet_ball(box: Interval, layer: Linear | Conv2d, ball: Interval) -> Interval:
    """Cut the first linear layer's box to what the l2 ball allows: ``W x +- ||W diag(reach)||_2`` (dual norm)."""
    centre, radius = layer.forward(ball.centre), layer.norm(ball.radius)
    lower = torch.maximum(box.lower, centre - radius)
    return Interval.between(lower, torch.minimum(box.upper, centre + radius).maximum(lower))
