"""Lower bounds of a reduced question on many subdomains at once: CROWN with optimised slopes and split multipliers.

alpha (Xu et al. 2021, arXiv 2011.13824): the slope of the line below each unstable ReLU is free in [0, 1]. beta
(Wang et al. 2021, arXiv 2103.06624): on a subdomain where a unit is known to be active (z >= 0) or inactive, a
multiplier >= 0 of that knowledge may be added to the bound. Any alpha in [0, 1] and beta >= 0 give a sound bound;
gradient ascent looks for good ones.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from certifiers.bounds import rounding

from .reduced import Reduced, Rows


@dataclass
class Domains:
    """Subdomains of a question, ``count`` of them: what each knows of the units, and its best multipliers.

    ``question``: (count,), which of ``Reduced.members``. ``lower``, ``upper``: (count, units). ``sign``: +1 active, -1
    inactive by a split, else 0. ``bound``: the best lower bound so far. ``mix``: (count, rows of a question), where
    questions have several rows, the logarithms of the weights by which these are combined.
    """

    question: Tensor
    lower: Tensor
    upper: Tensor
    sign: Tensor
    alpha: Tensor
    beta: Tensor
    bound: Tensor
    mix: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    def __getitem__(self, index) -> Domains:
        return Domains(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(parts: list[Domains]) -> Domains:
        return Domains(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Domains)))

    @staticmethod
    def root(problem: Reduced) -> Domains:
        """The whole region, once for each question; alpha as CROWN chooses it."""
        count, units = len(problem.members), len(problem.lower)
        lower, upper = (end.expand(count, units).clone() for end in (problem.lower, problem.upper))
        nothing = torch.zeros_like(lower)
        question = torch.arange(count, device=lower.device)
        worst = lower.new_full((count,), -torch.inf)
        slopes = crown_slopes(lower, upper)
        return Domains(question, lower, upper, nothing, slopes, nothing.clone(), worst, problem.choices.clone())


def asked_of(problem: Reduced, domains: Domains) -> Rows:
    """The row that each domain is about: of a question with several, their combination by the weights at hand.

    Where a combination with weights >= 0 is above 0, so is one of the rows.
    """
    return problem.combined(domains.question, domains.mix.softmax(1))


def crown_slopes(lower: Tensor, upper: Tensor) -> Tensor:
    return (upper > -lower).to(lower)


@dataclass(frozen=True)
class Bound:
    """``value`` (count,); ``units`` (count, units): the coefficients that met each unit's output on the way back;
    ``inputs`` (count, pixels): those that arrived at the input."""

    value: Tensor
    units: Tensor
    inputs: Tensor


def bound(problem: Reduced, rows: Rows, domains: Domains) -> Bound:
    """Lower bounds of ``rows``, one for each of ``domains``, with the alpha and beta that these hold.

    They hold in exact arithmetic: what rounding may have cost is taken off.
    """
    lower, upper, alpha = domains.lower, domains.upper, domains.alpha
    pull = domains.sign * domains.beta
    inputs, constant = rows.inputs, rows.constant
    pending = [rows.units[:, level] for level in problem.levels]
    met = [None] * len(pending)
    below, above = lower.clamp(max=0), upper.clamp(min=0)
    chord = above / (above - below).clamp(min=torch.finfo(lower.dtype).tiny)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, alpha))
    intercept = -chord * below
    spare = rounding.gamma(_terms(problem), lower.dtype)
    lost = rows.error + spare * problem.reach(rows)
    for index in range(len(problem.levels) - 1, -1, -1):
        level, row = problem.levels[index], pending[index]
        met[index] = row
        positive, negative = row.clamp(min=0), row.clamp(max=0)
        z = positive * slope[:, level] + negative * chord[:, level] - pull[:, level]
        before = problem.before[level]
        constant = constant + (negative * intercept[:, level]).sum(1) + z @ before.constant
        inputs = inputs + z @ before.inputs
        with torch.no_grad():
            size = z.abs()
            lost = lost + size @ (before.error + spare * problem.unit_reach[level])
            lost = lost + spare * ((row.abs() + size + pull[:, level].abs()) @ (2 * problem.unit_size[level]))
        for earlier in range(index):
            pending[earlier] = pending[earlier] + z @ before.units[:, problem.levels[earlier]]
    value = problem.region.minimum(inputs.unsqueeze(0)).squeeze(0) + constant
    with torch.no_grad():
        lost = lost + spare * (inputs.abs() @ problem.pixel_size + constant.abs())
    value = value - 1.01 * lost
    return Bound(value, torch.cat(met, 1) if met else rows.units, inputs)


def _terms(problem: Reduced) -> int:
    """Of how many terms any sum in :func:`bound` is made at most."""
    pixels, units = problem.before.inputs.shape[1], len(problem.lower)
    return pixels + units + 2 * len(problem.levels)


def improve(
    problem: Reduced, rows: Rows | None, domains: Domains, steps: int, rate: float = 0.2, deadline: float = math.inf
) -> Bound:
    """Ascend alpha and beta of ``domains`` in place for ``steps`` steps; the best of each domain is kept.

    ``rows``: one for each domain; None: what these are about, and of a question with several rows the weights ascend
    too. Domains proven on the way are not special: their bound is above 0. After
    ``deadline`` (of ``time.monotonic``) no step begins.
    """
    mixed = rows is None and domains.mix.shape[1] > 1
    rows = asked_of(problem, domains) if rows is None else rows
    steps = steps if problem.levels or mixed else 0  # else there is nothing to improve
    alpha, beta, mix = (part.clone().requires_grad_(True) for part in (domains.alpha, domains.beta, domains.mix))
    split = bool((domains.sign != 0).any())
    rates = ((alpha, rate), (beta, rate / 2), *([(mix, 2 * rate)] if mixed else []))
    optimizer = torch.optim.Adam([{"params": [part], "lr": each} for part, each in rates])
    found = None
    for step in range(steps + 1):
        if time.monotonic() > deadline:
            steps = step
        with torch.set_grad_enabled(step < steps):
            here = replace(domains, alpha=alpha, beta=beta, mix=mix)
            now = bound(problem, asked_of(problem, here) if mixed else rows, here)
        value = now.value.detach()
        better = (value > domains.bound).unsqueeze(1)
        domains.bound = torch.maximum(domains.bound, value)
        domains.alpha = torch.where(better, alpha.detach(), domains.alpha)
        domains.beta = torch.where(better, beta.detach(), domains.beta)
        domains.mix = torch.where(better, mix.detach(), domains.mix)
        kept = Bound(value, now.units.detach(), now.inputs.detach())
        found = kept if found is None else Bound(
            domains.bound, torch.where(better, kept.units, found.units), torch.where(better, kept.inputs, found.inputs)
        )  # fmt: skip
        if step == steps:
            return found
        optimizer.zero_grad(set_to_none=True)
        (-now.value.sum()).backward()
        if not split:
            beta.grad = None
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
        with torch.no_grad():
            alpha.clamp_(0, 1)
            beta.clamp_(min=0)


def tighten(problem: Reduced, steps: int, deadline: float = math.inf, chunk: int = 512) -> Reduced:
    """The question with smaller boxes of its units, level by level, by optimised slopes."""
    lower, upper = problem.lower.clone(), problem.upper.clone()
    for level in problem.levels[1:]:
        now = replace(problem, lower=lower, upper=upper)
        rows = problem.before[level]
        both = Rows.cat([rows, -rows])
        if time.monotonic() > deadline:
            break
        for start in range(0, len(both), chunk):
            some = both[start : start + chunk]
            domains = Domains.root(now)[torch.zeros(len(some), dtype=torch.long)]
            improve(now, some, domains, steps, deadline=deadline)
            both.constant[start : start + chunk] = domains.bound  # from here on: the bounds
        least, most = both.constant.chunk(2)
        lower[level] = torch.maximum(lower[level], least)
        upper[level] = torch.minimum(upper[level], -most)
    return replace(problem, lower=lower, upper=torch.maximum(lower, upper))
