"""The comparisons of a study: which networks are held against which, and what the tests of ``paired_tests`` say.

But for networks whose masks come from another loss, only networks of one recipe are compared, which have the same
pretraining and as many epochs. Which budget and schedule stand for a criterion is chosen by certified accuracy on the
*validation* images, for the baseline as for what is held against it, so that the test images decide nothing but the
comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy

from certifiers.verdict import Status
from certprune.reports.compare import BASELINES, alike, counted, same_loss
from certprune.reports.look import percent
from certprune.reports.paired_tests import Crossed, clustered_p, crossed_difference, holm, mcnemar_p
from certprune.reports.rows import NONE, Column, points
from certprune.reports.study_rows import Section, StudyRow

SMALLEST = 1e-4  # smaller p values are told as below this


class OneSeed(NamedTuple):
    """The exact McNemar test of one seed: images that only the first, and only the second network certifies."""

    seed: int | None
    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """Certified accuracy of ``first`` less that of ``second``, over the seeds and images that both have."""

    sparsity: float
    first: StudyRow
    second: StudyRow
    images: int
    crossed: Crossed
    clustered: float | None
    seeds: tuple[OneSeed, ...]
    same: bool = True  # the same images under every seed
    adjusted: float | None = None  # p, adjusted for the comparisons of one table

    columns: ClassVar[tuple[Column, ...]] = (
        Column("Sparsity", lambda row: percent(row.sparsity, 2)),
        Column("Network", lambda row: row.first.label, left=True),
        Column("against", lambda row: row.second.label, left=True),
        Column("Certified, points", lambda row: points(row.crossed.difference, sign=True)),
        Column("p", lambda row: p_text(row.crossed.p)),
        Column("p, Holm", lambda row: p_text(row.adjusted)),
        Column("p, clustered", lambda row: p_text(row.clustered)),
        Column("Seed by seed: only first / only second, McNemar’s p", lambda row: _seed_by_seed(row), left=True),
    )


def p_text(p: float | None) -> str:
    """A p value as a reader wants it: two digits that tell, nothing below :data:`SMALLEST`."""
    if p is None:
        return NONE
    if p < SMALLEST:
        return f"< {SMALLEST:.4f}"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}" if p < 0.001 else f"{p:.3f}"


def _seed_by_seed(row: Comparison) -> str:
    return "; ".join(f"{s.only_first:,} / {s.only_second:,}, {p_text(s.p)}" for s in row.seeds)


def chosen(rows: Iterable[StudyRow]) -> StudyRow | None:
    """The row with the highest mean certified accuracy on validation images, of those with the most seeds.

    None where there is no row, or where there are several and validation figures are not on record.
    """
    rows = list(rows)
    most = max((len(row.nets) for row in rows), default=0)
    rows = [row for row in rows if len(row.nets) == most]
    if len(rows) < 2:
        return rows[0] if rows else None
    rated = [row for row in rows if len(row.each("validation_certified")) == most]
    return max(rated, key=lambda row: row.mean("validation_certified") or 0.0, default=None)


def best_learned(rows: Sequence[StudyRow]) -> list[StudyRow]:
    """Of each criterion that learns masks on the certified loss, the budget and schedule that validation chooses."""
    criteria = dict.fromkeys(row.network.criterion for row in rows if row.learned)
    found = [chosen(row for row in rows if row.learned and row.network.criterion == name) for name in criteria]
    return [row for row in found if row is not None]


def against_magnitude(section: Section) -> list[Comparison]:
    """Each learned criterion against least magnitude, each with the budget and schedule that validation chooses."""
    pairs = []
    for level, rows in section.by_recipe():
        magnitude = [row for row in rows if row.network.criterion == "magnitude" and not row.elsewhere]
        for row in best_learned(rows):
            best = chosen(other for other in magnitude if same_loss(row.network, other.network))
            pairs += [] if best is None else [(level, row, best)]
    return compared(pairs)


def against_dense(section: Section) -> list[Comparison]:
    """Each learned criterion against the network of its recipe that is not pruned."""
    dense = {row.recipe: row for row in reversed(section.groups.get(0.0, ())) if not row.pruned and not row.small}
    return compared(
        (level, row, yardstick)
        for level, rows in section.by_recipe()
        for row in best_learned(rows)
        if (yardstick := dense.get(row.recipe)) is not None
    )


def against_published(section: Section) -> list[Comparison]:
    """What validation chooses among all learned networks against HYDRA as published: scores, every layer alike."""
    pairs = []
    for level, rows in section.by_recipe():
        hydra = next((row for row in rows if row.learned and row.way[:4] == ("score", None, "uniform", "")), None)
        best = chosen(best_learned(rows))
        if hydra is not None and best not in (None, hydra):
            pairs.append((level, best, hydra))
    return compared(pairs)


def at_equal_budgets(section: Section) -> list[Comparison]:
    """Every learned network against each baseline of the same sparsity, budget and schedule."""
    return compared(
        (level, row, other)
        for level, rows in section.by_recipe()
        for row in rows
        for other in rows
        if row.learned and other.network.criterion in BASELINES and not other.elsewhere
        if (row.network.budget, row.network.how) == (other.network.budget, other.network.how)
        if same_loss(row.network, other.network)
    )


def against_elsewhere(section: Section) -> list[Comparison]:
    """What validation chooses among networks pruned on the loss they are for, against each pruned on another one.

    Of the same criterion where there is one of it, else of any learned one.
    """
    pairs = []
    for level, rows in section.groups.items():
        for other in (row for row in rows if row.elsewhere):
            own = [row for row in rows if row.pruned and not row.elsewhere]
            same = [row for row in own if row.network.criterion == other.network.criterion]
            equal = [row for row in same if (row.network.budget, row.network.how) == other.way[2:4]]
            best = chosen(equal or same or [row for row in own if row.learned])
            if best is not None:
                pairs.append((level, best, other))
    return compared(pairs)


def compared(pairs: Iterable[tuple[float, StudyRow, StudyRow]]) -> list[Comparison]:
    """The comparisons of these pairs, as one family: their p values are adjusted for each other."""
    found = [row for pair in pairs if (row := compare(*pair)) is not None]
    adjusted = holm([row.crossed.p for row in found])
    return [replace(row, adjusted=p) for row, p in zip(found, adjusted, strict=True)]


def compare(sparsity: float, first: StudyRow, second: StudyRow) -> Comparison | None:
    """One comparison, over the seeds and images that both networks have; None where they share none.

    A seed counts only if both were certified on the same split, in the same norm and by the same methods.
    """
    both = {seed: [row.nets[seed].ledger for row in (first, second)] for seed in first.nets if seed in second.nets}
    ledgers = {seed: each for seed, each in both.items() if alike(*each)}
    held = {seed: [_certified(ledger) for ledger in both] for seed, both in ledgers.items()}
    shared = set.intersection(*(one.keys() & other.keys() for one, other in held.values())) if held else set()
    if not shared:
        return None
    images = sorted(shared)
    gaps = numpy.array([[int(one[i]) - int(other[i]) for i in images] for one, other in held.values()])
    labels = {
        tuple(v.label for v in sorted(ledger.verdicts, key=lambda v: v.index) if v.index in shared)
        for both in ledgers.values()
        for ledger in both
    }
    same = len(labels) == 1
    by_seed = []
    for seed, (one, other) in held.items():
        only_first, only_second, _ = counted(*({i: each[i] for i in images} for each in (one, other)))
        by_seed.append(OneSeed(seed, only_first, only_second, mcnemar_p(only_first, only_second)))
    crossed = crossed_difference(gaps, same)
    clustered = clustered_p(gaps) if same else None
    return Comparison(sparsity, first, second, len(images), crossed, clustered, tuple(by_seed), same)


def _certified(ledger: Any) -> dict[int, bool]:
    return {verdict.index: verdict.status is Status.certified for verdict in ledger.verdicts}
