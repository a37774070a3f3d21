"""Which unit to split next, and the two halves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .bounding import Bound, Domains, asked_of, bound
from .reduced import Reduced

CANDIDATES = 8  # units of each domain whose halves are really bounded before one is chosen


def free(domains: Domains) -> Tensor:
    """(count, units): the units that may still be split."""
    return (domains.lower < 0) & (domains.upper > 0)


def halves(domains: Domains, unit: Tensor) -> Domains:
    """The domains with ``unit`` (count,) active, then those with it inactive."""
    column = unit.unsqueeze(1)
    children = []
    for sign in (1.0, -1.0):
        end = domains.lower if sign > 0 else domains.upper
        cut = end.scatter(1, column, 0.0)
        ends = (cut, domains.upper) if sign > 0 else (domains.lower, cut)
        signs = domains.sign.scatter(1, column, sign)
        children.append(replace(domains, lower=ends[0], upper=ends[1], sign=signs))
    return Domains.cat(children)


@torch.no_grad()
def choose(problem: Reduced, domains: Domains, found: Bound) -> Tensor:
    """(count,): the unit of each domain whose halves are bounded best; every domain must have a free one.

    Filtered smart branching (De Palma et al. 2021, arXiv 2104.06718): units are ranked by how much the relaxation
    of each costs the bound at most, |coefficient| times the height of its triangle; of the first few the halves are
    bounded with the slopes at hand, and the unit whose worse half is best is taken.
    """
    below, above = domains.lower.clamp(max=0), domains.upper.clamp(min=0)
    height = -above * below / (above - below).clamp(min=torch.finfo(below.dtype).tiny)
    score = (found.units.abs() * height).masked_fill(~free(domains), -1.0)
    score, units = score.topk(min(CANDIDATES, score.shape[1]), dim=1)
    count, tries = units.shape
    repeated = domains[torch.arange(count, device=units.device).repeat_interleave(tries)]
    tried = halves(repeated, units.flatten())
    values = bound(problem, asked_of(problem, tried), tried).value
    active, inactive = values.reshape(2, count, tries)
    worse = torch.minimum(active, inactive).clamp(max=0) + 1e-3 * torch.maximum(active, inactive).clamp(max=0)
    return units.gather(1, worse.masked_fill(score < 0, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
