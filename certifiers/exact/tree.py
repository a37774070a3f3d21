"""Branch and bound: split unstable units until every subdomain is proven, or an input that breaks one is found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

from .bounding import Bound, Domains, bound, crown_slopes, improve, tighten
from .branching import asked_of, choose, free, halves
from .milp import lowest
from .reduced import Reduced, Rows

BATCH = 256  # domains bounded together
TIGHTEN_STEPS, ROOT_STEPS, STEPS = 10, 60, 12
FEW_UNITS = 200  # up to so many, a mixed-integer program looks for a counterexample first
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
    """Decide whether everywhere in the region every question is true: one of its rows is above 0.

    Args:
        problem: in float64.
        deadline: of ``time.monotonic``.
        confirm: whether an input (pixels,) really breaks the property; asked before it is believed.
    """
    problem = tighten(problem, TIGHTEN_STEPS, deadline)
    pool = Domains.root(problem)
    counted = len(pool)
    found = improve(problem, None, pool, ROOT_STEPS, deadline=deadline)
    floor = torch.inf
    integers = len(problem.lower) <= FEW_UNITS
    while True:
        witness = _witness(problem, pool, found, confirm)
        if witness is not None:
            return Outcome(False, -torch.inf, witness, counted)
        done = pool.bound > 0
        floor = min(floor, pool.bound[done].amin().item() if done.any() else torch.inf)
        pool = pool[~done]
        if len(pool) == 0:
            return Outcome(True, floor, None, counted)
        if time.monotonic() > deadline:
            return Outcome(None, pool.bound.amin().item(), None, counted)
        if integers:
            integers = False
            witness = _by_integers(problem, pool, deadline, confirm)
            if witness is not None:
                return Outcome(False, -torch.inf, witness, counted)
        rest, pool = _take(pool)
        pool, witness, least = _without_leaves(problem, pool, confirm)
        if witness is not None:
            return Outcome(False, -torch.inf, witness, counted)
        if not least > 0:  # on the edge: neither provable nor, in the network's own arithmetic, broken
            return Outcome(None, least, None, counted)
        floor = min(floor, least)
        if len(pool):
            pool, found = _split(problem, pool, deadline)
            counted += len(pool)
        pool, found = _joined(pool, found, rest)


def _take(pool: Domains) -> tuple[Domains, Domains]:
    """All but the worst domains, and the worst."""
    order = pool.bound.argsort()
    return pool[order[BATCH:]], pool[order[:BATCH]]


def _by_integers(problem: Reduced, pool: Domains, deadline: float, confirm) -> Tensor | None:
    """A confirmed witness that integer programs find to the open questions, in a third of the time left, or None."""
    until = time.monotonic() + (deadline - time.monotonic()) / 3
    for question in pool.question.tolist():
        value, point = lowest(problem, question, until - time.monotonic())
        if value <= 0 and confirm(point):
            return point
    return None


def _split(problem: Reduced, pool: Domains, deadline: float) -> tuple[Domains, Bound]:
    rows = asked_of(problem, pool)
    with torch.no_grad():
        now = bound(problem, rows, pool)
    pool = halves(pool, choose(problem, pool, now))
    _narrow(problem, pool)
    return pool, improve(problem, None, pool, STEPS, deadline=deadline)


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
            tiled = (rows if sign > 0 else -rows).repeat(count)
            ends = bound(problem, tiled, each).value.reshape(count, units)
            if sign > 0:
                pool.lower[:, level] = torch.maximum(pool.lower[:, level], ends)
            else:
                pool.upper[:, level] = torch.minimum(pool.upper[:, level], -ends)
    empty = (pool.lower > pool.upper).any(1)
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
    points = problem.region.minimiser(found.inputs.unsqueeze(0))[0]
    worst, _ = problem.answers(points).min(1)
    for index in (worst <= 0).nonzero().flatten().tolist()[:4]:
        if confirm(points[index]):
            return points[index]
    return None


def _without_leaves(problem: Reduced, pool: Domains, confirm) -> tuple[Domains, Tensor | None, float]:
    """Domains with nothing left to split are linear programs, and are decided as such.

    Returns the others, a confirmed witness or None, and the least bound of a leaf.
    """
    leaf = ~free(pool).any(1)
    least = float("inf")
    for index in leaf.nonzero().flatten().tolist():
        value, point = _leaf(problem, pool[torch.tensor([index])])
        if point is not None and confirm(point):
            return pool, point, value
        least = min(least, value if value > 0 else -float("inf"))  # NaN proves nothing
    return pool[~leaf], None, least


@torch.no_grad()
def _leaf(problem: Reduced, leaf: Domains) -> tuple[float, Tensor | None]:
    """A lower bound of a leaf's question (inf where the leaf is empty), and an input where it seems not positive.

    The linear program is believed for its multipliers alone: as beta they give a bound that holds whatever the
    solver's tolerances (weak duality).
    """
    active = leaf.lower[0] >= 0
    leaf = replace(leaf, sign=torch.where(active, 1.0, -1.0).to(leaf.lower).unsqueeze(0))
    units, constants = _fixed(problem, active)
    rows = problem.asked[problem.members[int(leaf.question)]]
    chosen = rows.units * active
    asked, offset = rows.inputs + chosen @ units, rows.constant + chosen @ constants
    # The sides of the leaf, as values that must not be positive.
    sides, at = -leaf.sign[0].unsqueeze(1) * units, -leaf.sign[0] * constants
    found = _least(problem, (asked, offset), (sides, at))
    if found.status == 0:
        most = -torch.from_numpy(found.ineqlin.marginals).to(leaf.beta).clamp(max=0)
        weights, leaf.beta = most[: len(rows)], most[len(rows) :].unsqueeze(0)
        leaf.mix[0, : len(rows)] = weights.clamp(min=1e-12).log()
        value = float(bound(problem, asked_of(problem, leaf), leaf).value)
        pixels = problem.before.inputs.shape[1]
        return value, torch.from_numpy(found.x[:pixels].copy()) if found.fun <= 0 else None
    # No input keeps all sides, it seems: then a combination of them is positive everywhere, which is a proof.
    found = _least(problem, (sides, at))
    if found.status != 0:
        return -float("inf"), None
    leaf.beta = -torch.from_numpy(found.ineqlin.marginals).to(leaf.beta).clamp(max=0).unsqueeze(0)
    nothing = Rows(*(torch.zeros_like(part[:1]) for part in vars(rows).values()))
    return (float("inf") if bound(problem, nothing, leaf).value > 0 else -float("inf")), None


def _fixed(problem: Reduced, active: Tensor) -> tuple[Tensor, Tensor]:
    """Every unit's z as a linear function of the input, where these units are active and the others are not."""
    inputs, constant = torch.zeros_like(problem.before.inputs), torch.zeros_like(problem.before.constant)
    for level in problem.levels:
        rows = problem.before[level]
        inputs[level] = rows.inputs + (rows.units * active) @ inputs
        constant[level] = rows.constant + (rows.units * active) @ constant
    return inputs, constant


def _least(problem: Reduced, asked: tuple[Tensor, Tensor], sides: tuple[Tensor, Tensor] | None = None):
    """The least that the largest of the linear functions ``asked`` can be where no side is positive.

    Each are (coefficients, constants) of the input, which lies in its box; the last variable is above all asked.
    """
    box = problem.region.box
    rows = torch.cat([asked[0], -torch.ones_like(asked[1]).unsqueeze(1)], 1)
    most = -asked[1]
    if sides is not None:
        rows = torch.cat([rows, F.pad(sides[0], (0, 1))])
        most = torch.cat([most, -sides[1]])
    ends = [*zip(box.lower[0].tolist(), box.upper[0].tolist(), strict=True), (None, None)]
    cost = torch.zeros(rows.shape[1])
    cost[-1] = 1
    return linprog(cost.numpy(), rows.numpy(), most.numpy(), bounds=ends, method="highs")
