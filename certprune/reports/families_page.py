"""Families of runs as one Markdown page, and as CSV: what ``results/objectives.md`` holds."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from certprune.reports.families import (
    BY_BOUNDS,
    Cells,
    Family,
    FamilyTable,
    GapRow,
    Measure,
    NetworkRow,
    budget_label,
    sparsity_label,
)
from certprune.reports.look import BUDGETS, percent
from certprune.reports.rows import NONE, Column, duration, points
from certprune.reports.splits import images_of, reuse, splits_of
from certprune.reports.study import origin
from certprune.reports.tables import markdown_table

NOTES = """\
Clean: the share of {images} that are classified correctly. Attack: correct and not broken by PGD. Certified:
correct *and* proven for every perturbation of the threat set, by any of the methods named; IBP certified: by
interval bounds alone. The true robust accuracy lies between certified and attack. Under randomized smoothing, the
share at radius r is that of images which the smoothed classifier gets right with a certified ℓ2 radius of at least r;
at r = 0, right without abstaining.

Means over seeds; in brackets, 95 % Student t-intervals over the seeds (other training runs), differences paired by
seed. One seed has no interval. Epochs are selected on the validation split; every network of a family trains for the
same epochs after pretraining.{reused} A dash is a figure that was not measured, never a zero.
"""


class Line(NamedTuple):
    """A family's table in the summaries, and the network or difference that stands for it there."""

    family: Family
    table: FamilyTable
    row: NetworkRow | GapRow | None

    @property
    def cells(self) -> Cells | None:
        return self.row.cells if self.row else None


def families_page(
    found: Sequence[Family], title: str, command: str, sparsity: float = 0.99, budget: str = "uniform"
) -> str:
    """The page: dense networks side by side, learned scores minus magnitude at one budget, then every family."""
    splits = splits_of([run for family in found for run in family.runs])
    notes = NOTES.format(images=images_of(splits), reused=f" {reuse(splits)}".rstrip())
    parts = [f"# {title}", f"Made by `{command}`.", notes]
    parts += ["## Dense networks", *_summaries(found, lambda table: table.dense, costs=True)]
    where = f"{percent(sparsity, 2)}, {BUDGETS.get(budget, budget)} budget"
    gaps = _summaries(found, lambda table: table.gap(sparsity, budget), sign=True)
    parts += [f"## Learned scores minus least magnitude at {where}", "In percentage points.", *gaps]
    for family in found:
        parts += _section(family)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def families_csv(found: Sequence[Family]) -> str:
    """Every figure at full precision, one a line: a network's accuracy, or a difference between two networks."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["family", "recipe", "certified_by", "level", "figure", "network", "criterion", "budget", "sparsity"]
        + ["measure", "seeds", "images", "mean", "lower", "upper", "each"]
    )
    for family in found:
        for table in family.tables:
            for about, cells in _figures(table):
                for measure in table.source.measures:
                    rate = cells.rates[measure.key]
                    values = ("", "", "") if rate is None else (rate.value, rate.lower, rate.upper)
                    source = (family.title, family.runs[0].name, table.source.kind, table.source.level)
                    each = " ".join(map(repr, cells.each[measure.key]))
                    writer.writerow([*source, *about, measure.key, len(cells.seeds), cells.n, *values, each])
    return out.getvalue()


def _figures(table: FamilyTable) -> Iterator[tuple[tuple, Cells]]:
    for row in table.rows:
        variant = row.variant
        yield ("accuracy", variant.name, variant.criterion, variant.budget, variant.sparsity), row.cells
    for gap in table.gaps:
        both = f"{gap.first.criterion}-{gap.second.criterion}"
        name = f"{gap.first.name} - {gap.second.name}"
        yield ("difference", name, both, gap.first.budget, gap.first.sparsity), gap.cells


def _summaries(found: Sequence[Family], pick, sign: bool = False, costs: bool = False) -> list[str]:
    """A table for the families that were certified by bounds, and one for those by smoothing."""
    parts = []
    for kind, level in (("bounds", "eps"), ("smoothing", "sigma")):
        lines = [
            Line(family, table, pick(table)) for family in found for table in family.tables if table.source.kind == kind
        ]
        if not lines:
            continue
        measures = list(dict.fromkeys(m for line in lines for m in line.table.source.measures))
        measures.sort(key=lambda measure: BY_BOUNDS.index(measure) if measure in BY_BOUNDS else measure.radius)
        columns = [
            Column("Objective", lambda line: line.family.title.split(",")[0] + _apart(line, found), left=True),
            Column(level, lambda line: f"{line.table.source.level:g}"),
            *(_column(measure, sign) for measure in measures),
            Column("Seeds", lambda line: str(len(line.cells.seeds)) if line.cells else "0"),
            Column("Images", lambda line: _images(line.cells, line.table)),
        ]
        if costs:
            columns += [
                Column("Epochs", lambda line: _epochs(line.family)),
                Column("Pretraining", lambda line: duration(line.family.pretraining_seconds)),
                Column("All training", lambda line: duration(line.family.training_seconds)),
            ]
        parts.append(markdown_table(lines, columns))
    if costs and parts:
        parts.append(
            "Epochs: pretraining + pruning + finetuning; the dense network is finetuned for the last two together. "
            "Times are means over the seeds; all training is that of every network of one run."
        )
    return parts


def _apart(line: Line, found: Sequence[Family]) -> str:
    """The recipe's name, where several families share an objective; how both were pruned, where it is not as usual."""
    how = line.row.first.how if isinstance(line.row, GapRow) else ""
    first = line.family.title.split(",")[0]
    alike = [family for family in found if family.title.split(",")[0] == first]
    named = f" ({line.family.runs[0].name})" if len(alike) > 1 and "(" not in first else ""
    return f"{named}, {how}" if how else named


def _section(family: Family) -> Iterator[str]:
    yield f"## {family.title}"
    yield (
        f"Recipe `{family.runs[0].name}`, {_seeds(family)}. Epochs {_epochs(family)}. Training: pretraining "
        f"{duration(family.pretraining_seconds)}, one network after it {duration(family.network_seconds)}, all of one "
        f"run {duration(family.training_seconds)}."
    )
    if not family.tables:
        yield "Nothing is certified yet."
    for table in family.tables:
        yield f"{_first_up(table.note)}; {table.images} images."
        yield markdown_table(
            table.rows,
            [
                Column("Network", lambda row: row.label, left=True),
                *(_column(measure) for measure in table.source.measures),
                Column("Seeds", lambda row: str(len(row.cells.seeds))),
                Column("Images", lambda row: NONE if row.cells.n is None else f"{row.cells.n:,}"),
            ],
        )
        if table.gaps:
            yield "Paired differences, in percentage points:"
            yield markdown_table(table.gaps, _gap_columns(table))
    if family.missing:
        yield "Not there yet:\n\n" + "\n".join(f"- {line}" for line in family.missing)
    yield origin(family.runs)


def _gap_columns(table: FamilyTable) -> list[Column]:
    def sparsity(gap: GapRow) -> str:
        return sparsity_label(gap.first)

    return [
        Column("Sparsity", sparsity),
        Column("Budget", lambda gap: budget_label(gap.first), left=True),
        Column("Difference", lambda gap: gap.label, left=True),
        *(_column(measure, sign=True) for measure in table.source.measures),
        Column("Seeds", lambda gap: str(len(gap.cells.seeds))),
    ]


def _column(measure: Measure, sign: bool = False) -> Column:
    def cell(row: Any) -> str | tuple[str, str]:
        return points(row.cells.rates.get(measure.key) if row.cells else None, sign)

    return Column(measure.heading.removesuffix(" %") if sign else measure.heading, cell)


def _images(cells: Cells | None, table: FamilyTable) -> str:
    return NONE if cells is None or cells.n is None else f"{cells.n:,} {table.images}"


def _epochs(family: Family) -> str:
    return " + ".join("?" if epochs is None else str(epochs) for epochs in family.epochs)


def _seeds(family: Family) -> str:
    seeds = [str(run.seed) for run in family.runs]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]
