"""Do certified and attack accuracy merely follow clean accuracy, from one pruned network to the next?

Sparsity alone moves all three, so that any two of them go together over networks of all sparsities. What is left at
equal sparsity is the partial correlation: of the deviations from the mean of the networks of each sparsity (sparsity
as a factor; the same as the residuals of a linear model with a constant for each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy
from scipy import stats

from certprune.reports.rows import NONE, Column, Rate
from certprune.reports.study_rows import Section

RESAMPLES, FEWEST = 1000, 4
CLOSE = 0.9  # a rank correlation that is this high for sure is called close
WORDS = {"certified": "certified accuracy", "attack": "attack accuracy"}


@dataclass(frozen=True)
class Following:
    """How ``measure`` follows clean accuracy over ``points`` (seeds x networks) of ``networks`` pruned networks.

    Intervals are 95 % percentiles of a bootstrap over the networks (all seeds of one together). ``spread``: the
    standard deviation, as a fraction, that a straight line in clean accuracy leaves within a sparsity.
    """

    measure: str
    networks: int
    points: int
    pearson: Rate
    spearman: Rate
    partial: Rate
    partial_spearman: Rate
    spread: float

    columns: ClassVar[tuple[Column, ...]] = (
        Column("Clean against", lambda row: WORDS[row.measure], left=True),
        Column("Pearson’s r", lambda row: _correlation(row.pearson)),
        Column("Spearman’s ρ", lambda row: _correlation(row.spearman)),
        Column("r at equal sparsity", lambda row: _correlation(row.partial)),
        Column("ρ at equal sparsity", lambda row: _correlation(row.partial_spearman)),
        Column("Left by a line in clean, points", lambda row: f"{100 * row.spread:.1f}"),
        Column("Networks", lambda row: f"{row.networks} ({row.points} with their seeds)"),
    )

    @property
    def sentence(self) -> str:
        """What came out, in words that the figures decide."""
        low, high, what = self.partial_spearman.lower, self.partial_spearman.upper, WORDS[self.measure]
        told = (
            f"over all pruned networks r = {_number(self.pearson.value)} and ρ = {_number(self.spearman.value)}, at "
            f"equal sparsity r = {_text(self.partial)} and ρ = {_text(self.partial_spearman)}; networks of one "
            f"sparsity with the same clean accuracy still differ by {100 * self.spread:.1f} points (standard deviation "
            "about a line)."
        )
        if not numpy.isfinite(self.partial_spearman.value):
            overall = f"r = {_text(self.pearson)} and ρ = {_text(self.spearman)}"
            return (
                f"Over all pruned networks, {what} and clean accuracy: {overall}; too few share a sparsity to say more."
            )
        if low is None or high is None or low <= 0 <= high:
            return f"At equal sparsity, {what} cannot be told to follow clean accuracy: {told}"
        if high < 0:
            return f"At equal sparsity, {what} falls where clean accuracy rises: {told}"
        if low >= CLOSE:
            return f"{what.capitalize()} follows clean accuracy closely, at equal sparsity too: {told}"
        return f"{what.capitalize()} follows clean accuracy in part: {told}"


def following(section: Section) -> list[Following]:
    """Certified and attack accuracy against clean; empty for fewer than four pruned networks."""
    rows = [row for row in section.rows if row.pruned]
    if len(rows) < FEWEST:
        return []
    clean = [row.each("clean") for row in rows]
    levels = [row.network.sparsity or 0.0 for row in rows]
    return [_follows(measure, clean, [row.each(measure) for row in rows], levels) for measure in WORDS]


def partial_correlation(x: numpy.ndarray, y: numpy.ndarray, levels: numpy.ndarray) -> float:
    """Pearson's correlation of the deviations from the means within each level; NaN where one of them is constant."""
    return pearson(_within(x, levels), _within(y, levels))


def pearson(x: numpy.ndarray, y: numpy.ndarray) -> float:
    """Pearson's correlation; NaN where one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = numpy.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 1e-12 else float("nan")


def _follows(
    measure: str, clean: Sequence[list[float]], other: Sequence[list[float]], levels: Sequence[float]
) -> Following:
    owner = numpy.repeat(numpy.arange(len(clean)), [len(values) for values in clean])
    x, y = (numpy.array([value for values in side for value in values]) for side in (clean, other))
    level = numpy.array(levels)[owner]
    dice, found = numpy.random.default_rng(0), []
    members = [numpy.flatnonzero(owner == place) for place in range(len(clean))]
    for _ in range(RESAMPLES):
        drawn = numpy.concatenate([members[place] for place in dice.integers(len(members), size=len(members))])
        found.append(_correlations(x[drawn], y[drawn], level[drawn]))
    ends = [_percentiles(column) for column in numpy.array(found).T]
    rates = [_rate(value, *end) for value, end in zip(_correlations(x, y, level), ends, strict=True)]
    inner, outer = _within(x, level), _within(y, level)
    slope = inner @ outer / (inner @ inner) if inner @ inner > 0 else 0.0
    free = max(len(x) - len(set(levels)) - 1, 1)
    spread = float(numpy.sqrt(((outer - slope * inner) ** 2).sum() / free))
    return Following(measure, len(clean), len(x), *rates, spread)


def _correlations(x: numpy.ndarray, y: numpy.ndarray, levels: numpy.ndarray) -> tuple[float, float, float, float]:
    """Pearson's and Spearman's, then both at equal level."""
    ranks = stats.rankdata(numpy.stack([x, y]), axis=1)
    return pearson(x, y), pearson(*ranks), partial_correlation(x, y, levels), partial_correlation(*ranks, levels)


def _percentiles(values: numpy.ndarray) -> tuple[float, float]:
    """The 95 % interval of the resamples that have a correlation; NaN where too few have one to say."""
    known = values[numpy.isfinite(values)]
    return tuple(numpy.percentile(known, (2.5, 97.5))) if len(known) > len(values) / 2 else (float("nan"),) * 2


def _within(values: numpy.ndarray, levels: numpy.ndarray) -> numpy.ndarray:
    """Deviations from the mean of each level."""
    _, place = numpy.unique(levels, return_inverse=True)
    return values - (numpy.bincount(place, values) / numpy.bincount(place))[place]


def _rate(value: float, low: float, high: float) -> Rate:
    ends = (None if not numpy.isfinite(end) else float(end) for end in (low, high))
    return Rate(value, *ends)


def _text(rate: Rate) -> str:
    return " ".join(_correlation(rate)) if numpy.isfinite(rate.value) else NONE


def _correlation(rate: Rate) -> str | tuple[str, str]:
    if not numpy.isfinite(rate.value):
        return NONE
    return _number(rate.value), f"[{_number(rate.lower)}, {_number(rate.upper)}]"


def _number(value: float | None) -> str:
    return NONE if value is None or not numpy.isfinite(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
