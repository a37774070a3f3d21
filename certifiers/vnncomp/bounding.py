"""Which polytopes no input of a box can reach, by linear bounds in float64 that account for rounding.

A polytope ``a y <= b`` is out of reach if some row has ``a_i y - b_i > 0`` everywhere in the box, or if a combination
of its rows with nonnegative weights has (Farkas).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bounds import rounding
from ..bounds.graph import Network
from ..bounds.interval import Intervals, propagate
from ..bounds.linear import crown_intervals, elided_bounds, lower_bounds
from ..bounds.region import Region
from .query import Polytope


class Rows:
    """The rows of several polytopes in one matrix, so that one pass bounds them all."""

    def __init__(self, polytopes: Sequence[Polytope]) -> None:
        self.a = torch.cat([p.a for p in polytopes])
        self.b = torch.cat([p.b for p in polytopes])
        sizes = torch.tensor([len(p.b) for p in polytopes])
        self.owner = torch.repeat_interleave(torch.arange(len(polytopes)), sizes)
        self.count = len(polytopes)

    def best(self, values: Tensor) -> Tensor:
        """The largest of each polytope's rows: (boxes, rows) to (boxes, polytopes)."""
        start = values.new_full((len(values), self.count), float("-inf"))
        return start.scatter_reduce(1, self.owner.expand_as(values), values, "amax")

    def slack(self, intervals: Intervals) -> Tensor:
        """What a bound of each row must exceed, (boxes, rows): the numbers of a file are rounded when they are read."""
        largest = intervals.reach[-1] @ self.a.abs().T + self.b.abs()
        return rounding.gamma(self.a.shape[1], self.a.dtype) * largest


def intervals_of(network: Network, lower: Tensor, upper: Tensor) -> Intervals:
    """Boxes of all nodes, for boxes of inputs (boxes, inputs), float64; rounding is accounted for."""
    return propagate(network, Region(rounding.between(lower, upper)), account_for_rounding=True)


def tightened(network: Network, intervals: Intervals, memory_mb: float = 256) -> Intervals:
    """The same with backward (CROWN) bounds in front of every nonlinear layer."""
    return crown_intervals(network, intervals, memory_mb)


@torch.no_grad()
def excluded(network: Network, intervals: Intervals, rows: Rows, method: str) -> Tensor:
    """(boxes, polytopes) bool: no input of the box reaches the polytope. ``method``: "ibp" or "crown"."""
    everywhere = rows.a.expand(len(intervals.region.box.centre), *rows.a.shape)
    if method == "ibp":
        least = elided_bounds(network, everywhere, intervals).lower
    else:
        least = lower_bounds(network, len(network.nodes) - 1, everywhere, intervals)
    return rows.best(least - rows.b - rows.slack(intervals)) > 0


def excluded_by_combination(network: Network, intervals: Intervals, polytope: Polytope, steps: int = 30) -> bool:
    """Whether weights are found with which the rows' combination is positive over the one box of ``intervals``.

    The bound is concave in the weights, which climb by exponentiated gradients.
    """
    rows = Rows([polytope])
    slack = rows.slack(intervals)[0].sum()  # the weights sum to 1
    logits = torch.zeros(len(rows.b), dtype=rows.b.dtype)
    for step in range(steps):
        logits.requires_grad_(True)
        weights = logits.softmax(0)
        row = (weights @ rows.a).reshape(1, 1, -1)
        least = lower_bounds(network, len(network.nodes) - 1, row, intervals)[0, 0] - weights @ rows.b
        if least > slack:
            return True
        (gradient,) = torch.autograd.grad(least, logits)
        logits = (logits + 2 / (1 + step) ** 0.7 * gradient / gradient.abs().amax().clamp(min=1e-12)).detach()
    return False
