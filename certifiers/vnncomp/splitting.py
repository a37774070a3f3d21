"""A complete search for networks of few inputs: the box is halved until every piece is decided."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..bounds.graph import Network
from ..bounds.linear import lower_bounds
from ..bounds.operations import Interval
from ..bounds.region import Region
from .bounding import Rows, intervals_of, tightened
from .left import Left

#: More inputs than this that can move are too many to halve.
MOST_INPUTS = 12
_BATCH = 128


def split_inputs(left: Left) -> tuple[str, Tensor | None]:
    """("unsat", None), ("sat", an input (inputs,) whose output the model puts in a polytope) or ("timeout", None).

    Also ("unknown", None) where pieces became too small to be halved. Depth first, so that memory stays small; a piece
    is halved where that moves the bounds most.
    """
    network, rows = left.network, Rows(left.polytopes)
    lowers, uppers = left.lower.unsqueeze(0), left.upper.unsqueeze(0)
    while len(lowers):
        if time.monotonic() > left.deadline:
            return "timeout", None
        some, lowers = lowers[-_BATCH:], lowers[:-_BATCH]
        ends, uppers = uppers[-_BATCH:], uppers[:-_BATCH]
        excess, reach = _bounds(network, some, ends, rows)
        open_ = ~(excess > 0).all(1)  # where a bound is not a number, nothing is known
        some, ends, reach = some[open_], ends[open_], reach[open_]
        if not len(some):
            continue
        middle = (some + ends) / 2
        with torch.no_grad():
            inside = rows.best(-_worst(left.model(middle), rows)) >= 0  # no row is above 0
        if inside.any():
            return "sat", middle[inside.any(1)][0]
        axis = reach.argmax(1, keepdim=True)
        cut = middle.gather(1, axis)
        if ((cut <= some.gather(1, axis)) | (cut >= ends.gather(1, axis))).any():
            return "unknown", None
        lowers = torch.cat([lowers, some, some.scatter(1, axis, cut)])
        uppers = torch.cat([uppers, ends.scatter(1, axis, cut), ends])
    return "unsat", None


def _worst(y: Tensor, rows: Rows) -> Tensor:
    """Each row replaced by the largest excess in its polytope, (boxes, rows)."""
    return rows.best(y @ rows.a.T - rows.b)[:, rows.owner]


def _bounds(network: Network, lower: Tensor, upper: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Lower bounds of each polytope's excess, (boxes, polytopes), and how much each input's width costs them."""
    with torch.no_grad():
        intervals = tightened(network, intervals_of(network, lower, upper))
        slack = rows.slack(intervals)
    centre, radius = intervals.region.box.centre, intervals.region.box.radius.clone().requires_grad_(True)
    intervals = intervals._replace(region=Region(Interval(centre, radius)))
    everywhere = rows.a.expand(len(lower), *rows.a.shape)
    least = lower_bounds(network, len(network.nodes) - 1, everywhere, intervals) - rows.b - slack
    excess = rows.best(least)
    (slope,) = torch.autograd.grad(excess.clamp(max=0).sum(), radius)
    reach = (radius * slope.abs()).detach().nan_to_num(0.0, posinf=0.0) + 1e-12 * radius.detach()
    return excess.detach(), reach
