"""Branch and bound: split unstable units until every subdomain is proven, or an input that breaks one is found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from .bounding import Bound, Domains, bound, crown_slopes, improve, tighten
from .branching import asked_of, choose, free, halves
from .milp import least_value
from .reduced import Reduced, Rows

BATCH = 256  # domains bounded together
TIGHTEN_STEPS, ROOT_STEPS, STEPS = 10, 60, 12
FEW_UNITS = 200  # up to so many, a mixed-integer program is tried first
NARROW = 32  # levels of at most so many units are bounded anew in each half


@dataclass(frozen=True)
class Outcome:
    """``proven``: True, False (then ``witness``, (pixels,), breaks it), or None where time ran out.

    ``bound``: what is proven of the smallest of the questions. ``domains``: how many were bounded.
    """

    proven: bool | None
    bound: float
    witness: Tensor | None
    domains: int


def search(problem: Reduced, deadline: float, confirm: Callable[[Tensor], bool]) -> Outcome:
    """Decide whether every row asked is above 0 everywhere in the region.

    Args:
        problem: in float64.
        deadline: of ``time.monotonic``.
        confirm: whether an input (pixels,) really breaks the property; asked before it is believed.
    """
    rounding = _rounding(problem)
    problem = tighten(problem, TIGHTEN_STEPS, deadline)
    pool = Domains.root(problem)
    counted = len(pool)
    found = improve(problem, asked_of(problem, pool), pool, ROOT_STEPS, deadline=deadline)
    floor = torch.inf
    integers = len(problem.lower) <= FEW_UNITS
    while True:
        witness = _witness(problem, pool, found, confirm)
        if witness is not None:
            return Outcome(False, -torch.inf, witness, counted)
        done = pool.bound > rounding
        floor = min(floor, pool.bound[done].amin().item() if done.any() else torch.inf)
        pool = pool[~done]
        if len(pool) == 0:
            return Outcome(True, floor, None, counted)
        if time.monotonic() > deadline:
            return Outcome(None, pool.bound.amin().item(), None, counted)
        if integers:
            integers = False
            pool, witness, floor = _by_integers(problem, pool, deadline, rounding, floor, confirm)
            if witness is not None:
                return Outcome(False, -torch.inf, witness, counted)
            if len(pool) == 0:
                return Outcome(True, floor, None, counted)
        rest, pool = _take(pool)
        pool, witness, least = _without_leaves(problem, pool, confirm)
        if witness is not None:
            return Outcome(False, -torch.inf, witness, counted)
        if least <= 0:  # on the edge: neither provable nor, in the network's own arithmetic, broken
            return Outcome(None, least, None, counted)
        if len(pool):
            pool, found = _split(problem, pool, deadline)
            counted += len(pool)
        pool, found = _joined(pool, found, rest)


def _rounding(problem: Reduced) -> float:
    """A bound must exceed this to be believed: 1e-11 of the largest sum of absolute values that it is made of."""
    box, rows = problem.region.box, problem.asked
    reach = (rows.inputs.abs() @ (box.centre.abs() + box.radius)[0]) + rows.constant.abs()
    units = rows.units.abs() @ torch.maximum(problem.lower.abs(), problem.upper.abs())
    return 1e-11 * float((reach + units).amax())


def _take(pool: Domains) -> tuple[Domains, Domains]:
    """All but the worst domains, and the worst."""
    order = pool.bound.argsort()
    return pool[order[BATCH:]], pool[order[:BATCH]]


def _by_integers(problem, pool: Domains, deadline: float, rounding: float, floor: float, confirm):
    """The open questions as mixed-integer programs, for a third of the time left: those not decided, a confirmed
    witness or None, and the least bound proven so far."""
    until = time.monotonic() + (deadline - time.monotonic()) / 3
    kept = []
    for index in range(len(pool)):
        value, point = least_value(problem, int(pool.question[index]), until - time.monotonic())
        if point is not None and confirm(point):
            return pool, point, floor
        pool.bound[index] = max(value, float(pool.bound[index]))
        if pool.bound[index] > rounding:
            floor = min(floor, float(pool.bound[index]))
        else:
            kept.append(index)
    return pool[torch.tensor(kept, dtype=torch.long)], None, floor


def _split(problem: Reduced, pool: Domains, deadline: float) -> tuple[Domains, Bound]:
    rows = asked_of(problem, pool)
    with torch.no_grad():
        now = bound(problem, rows, pool)
    pool = halves(pool, choose(problem, pool, now))
    _narrow(problem, pool)
    return pool, improve(problem, asked_of(problem, pool), pool, STEPS, deadline=deadline)


@torch.no_grad()
def _narrow(problem: Reduced, pool: Domains) -> None:
    """Bound the units of narrow levels anew, with what each domain knows; an empty domain is proven."""
    count = len(pool)
    for level in problem.levels[1:]:
        units = level.stop - level.start
        if units > NARROW:
            continue
        rows = problem.before[level]
        each = pool[torch.arange(count).repeat_interleave(units)]
        each.alpha, each.beta = crown_slopes(each.lower, each.upper), torch.zeros_like(each.beta)
        for sign in (1.0, -1.0):
            tiled = Rows(*(sign * part.repeat(count, *[1] * (part.dim() - 1)) for part in vars(rows).values()))
            ends = bound(problem, tiled, each).value.reshape(count, units)
            if sign > 0:
                pool.lower[:, level] = torch.maximum(pool.lower[:, level], ends)
            else:
                pool.upper[:, level] = torch.minimum(pool.upper[:, level], -ends)
    empty = (pool.lower > pool.upper + 1e-9).any(1)
    pool.bound = torch.where(empty, torch.inf, pool.bound)
    pool.upper = torch.maximum(pool.upper, pool.lower)


def _joined(pool: Domains, found: Bound | None, rest: Domains) -> tuple[Domains, Bound | None]:
    """The new domains with those that waited; only the new ones can offer new witnesses."""
    if len(rest) == 0:
        return pool, found
    return Domains.cat([pool, rest]), found


@torch.no_grad()
def _witness(problem: Reduced, pool: Domains, found: Bound | None, confirm: Callable[[Tensor], bool]) -> Tensor | None:
    """An input that breaks a question, among those where the domains' linear bounds are least."""
    if found is None or len(found.inputs) == 0:
        return None
    box = problem.region.box
    points = box.centre - box.radius * found.inputs.sign()
    if problem.region.x is not None:
        points = _into_ball(problem, found.inputs, points)
    worst, _ = problem.values(points).min(1)
    for index in (worst <= 0).nonzero().flatten().tolist()[:4]:
        if confirm(points[index]):
            return points[index]
    return None


def _into_ball(problem: Reduced, rows: Tensor, corners: Tensor) -> Tensor:
    region = problem.region
    lower, upper = region.box.lower, region.box.upper
    inside = region.x - region.eps * rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.minimum(torch.maximum(inside, lower), upper)


def _without_leaves(problem: Reduced, pool: Domains, confirm) -> tuple[Domains, Tensor | None, float]:
    """Domains with nothing left to split are linear programs, and are decided as such.

    Returns the others, a confirmed witness or None, and the least value of a leaf.
    """
    leaf = ~free(pool).any(1)
    least = float("inf")
    for index in leaf.nonzero().flatten().tolist():
        value, point = _linear_program(problem, pool, index)
        if value <= 0 and confirm(point):
            return pool, point, value
        least = min(least, value)
    return pool[~leaf], None, least


def _linear_program(problem: Reduced, pool: Domains, index: int) -> tuple[float, Tensor | None]:
    """The least value of a leaf's question (inf where the leaf is empty), and where."""
    inputs = torch.zeros_like(problem.before.inputs)
    constant = torch.zeros_like(problem.before.constant)
    active = (pool.lower[index] >= 0).to(inputs)
    for level in problem.levels:
        rows = problem.before[level]
        h = active.unsqueeze(1) * inputs, active * constant
        inputs[level] = rows.inputs + rows.units @ h[0]
        constant[level] = rows.constant + rows.units @ h[1]
    sign = torch.where(active > 0, -1.0, 1.0).to(inputs)  # active: -z <= 0
    question = problem.asked[int(pool.question[index])]
    cost = question.inputs + question.units @ (active.unsqueeze(1) * inputs)
    offset = question.constant + question.units @ (active * constant)
    box = problem.region.box
    found = linprog(
        cost.numpy(),
        (sign.unsqueeze(1) * inputs).numpy(),
        (-sign * constant).numpy(),
        bounds=np.stack([box.lower[0].numpy(), box.upper[0].numpy()], 1),
        method="highs",
    )
    if found.status == 2:
        return float("inf"), None
    return float(found.fun + offset), torch.from_numpy(found.x)
