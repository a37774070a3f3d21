"""The pictures of a study: certified accuracy against sparsity over the seeds, and against clean accuracy.

Colour says the criterion, in all of them alike.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from certprune.reports.compare import BASELINES
from certprune.reports.look import CRITERIA, DASHES, LIGHT, Network, chosen_by, percent, spread
from certprune.reports.plot import INK, dress
from certprune.reports.study_rows import Section, StudyRow

SLOTS = {name: slot for slot, name in enumerate(("score", "magnitude", "joint", "snip", "taylor", "random"), 1)}
BUDGET_MARKERS = {"erk": "o", "uniform": "s", "global": "D", "learned": "^"}
LEVEL_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
GRID = "#e3e5ea"


def colour(row: StudyRow) -> str:
    """Of the criterion; what was pruned against another loss than it is for has one of its own."""
    if not row.pruned:
        return LIGHT[0]
    return LIGHT[7] if row.elsewhere else LIGHT[SLOTS.get(str(row.network.criterion), 6)]


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, to be written as a PNG."""
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def main_ways(section: Section) -> list[list[StudyRow]]:
    """The ways of pruning that make a curve, each at its rising sparsities.

    Empty unless there is one of three sparsities or more; then a baseline at two alone is left to the tables.
    """
    held: dict[tuple, list[StudyRow]] = {}
    for row in section.rows:
        if row.pruned and row.mean("kept"):
            held.setdefault(row.way, []).append(row)
    curves = [rows for rows in held.values() if len(rows) > 1]
    main = [rows for rows in curves if len(rows) > 2 or rows[0].network.criterion not in BASELINES]
    return main if any(len(rows) > 2 for rows in main) else []


def certified_chart(section: Section) -> bytes | None:
    """Certified accuracy against the weights kept, logarithmic: means, and the seeds as small dots.

    The dense network is the level, dense networks with fewer weights from the start are a curve of their own. None
    where no way of pruning has three sparsities.
    """
    ways = main_ways(section)
    if not ways:
        return None
    figure = new_figure(9.6, 5.4)
    axes = figure.subplots()
    small = sorted((row for row in section.rows if row.small), key=lambda row: row.mean("kept") or 0)
    lines = [*ways, *([small] if small else [])]
    ends = [_line(axes, rows, place - (len(lines) - 1) / 2) for place, rows in enumerate(lines)]
    values = [value for rows in lines for row in rows for value in row.each("certified")]
    if section.dense is not None:
        level = section.dense.mean("certified")
        axes.axhline(level, color=LIGHT[0], linestyle=(0, (1, 1.5)), linewidth=1.4)
        ends.append((None, level, "dense, not pruned", LIGHT[0]))
        values.append(level)
    low, high = min(values), max(values)
    axes.set_ylim(max(low - 0.05, 0.0) if low > 0.06 else 0.0, min(high + 0.06 * (high - low) + 0.01, 1.0))
    _sparsity_axis(axes, section, [row for rows in lines for row in rows])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.set_title("Certified accuracy, means over seeds", loc="left", fontsize=11, color=INK)
    dress(axes)
    _name_ends(axes, ends)
    return png(figure)


def clean_chart(section: Section) -> bytes | None:
    """Certified and attack accuracy against clean accuracy: a point for each seed of each pruned network.

    Colour says the criterion, shape and size say the sparsity. None for fewer than two pruned networks.
    """
    rows = [row for row in section.rows if row.pruned]
    if len(rows) < 2:
        return None
    figure = new_figure(9.6, 5.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    levels = sorted({row.network.sparsity or 0.0 for row in rows})
    looks = {
        level: (LEVEL_MARKERS[i % len(LEVEL_MARKERS)], 46 - 26 * i / len(levels)) for i, level in enumerate(levels)
    }
    found = [value for row in rows for key in ("clean", "attack", "certified") for value in row.each(key)]
    edge = (max(min(found) - 0.02, 0.0), min(max(found) + 0.02, 1.0))
    for axes, (key, name) in zip(panels, (("certified", "Certified"), ("attack", "Attack")), strict=True):
        axes.plot(edge, edge, color=GRID, linewidth=1.2, zorder=0)
        for row in rows:
            marker, size = looks[row.network.sparsity or 0.0]
            look = {"marker": marker, "s": size, "color": colour(row), "alpha": 0.75, "linewidths": 0}
            axes.scatter(row.each("clean"), row.each(key), **look)
        axes.set_xlim(edge)
        axes.set_ylim(edge)
        axes.set_xlabel("clean accuracy", color=INK)
        axes.set_title(f"{name} accuracy", loc="left", fontsize=11, color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
        dress(axes)
    kinds = {_kind(row): colour(row) for row in rows}
    handles = [axes.scatter([], [], marker="o", s=36, color=shade, linewidths=0) for shade in kinds.values()]
    handles += [
        axes.scatter([], [], marker=mark, s=size, color=LIGHT[0], linewidths=0) for mark, size in looks.values()
    ]
    texts = [*kinds, *(f"{percent(level, 2)} removed" for level in levels)]
    figure.legend(handles, texts, loc="outside lower left", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return png(figure)


def _line(axes, rows: Sequence[StudyRow], shift: float) -> tuple:
    """Draw one curve; where it ends, its label and colour. ``shift``: its place among the curves, for the seeds."""
    held = sorted(rows, key=lambda row: -(row.mean("kept") or 0))
    first = held[0]
    xs = [(row.mean("kept") or 0) * 1.012**shift for row in held]
    ys = [row.mean("certified") for row in held]
    look: dict[str, Any] = {"color": colour(first), "linewidth": 1.8, "markersize": 4.5}
    if first.small:
        look |= {"linestyle": (0, (1, 1.5)), "marker": "x"}
    else:
        dash = () if "gradual" in first.network.how else DASHES["magnitude"]
        look |= {"linestyle": (0, tuple(on / 2 for on in dash)) if dash else "solid"}
        look |= {"marker": BUDGET_MARKERS.get(str(first.network.budget), "P")}
    axes.plot(xs, ys, **look)
    for x, row in zip(xs, held, strict=True):
        seeds = row.each("certified")
        if len(seeds) > 1:  # an interval of two or three would cover the picture: these are in the tables
            axes.scatter([x] * len(seeds), seeds, color=look["color"], s=9, alpha=0.5, linewidths=0)
    label = "dense from the start" if first.small else first.label
    return (xs[-1], ys[-1], label, look["color"])


def _sparsity_axis(axes, section: Section, rows: Sequence[StudyRow]) -> None:
    """Weights kept, fewer to the right, with the sparsity where there is one; room at the right for the labels."""
    kept = [row.mean("kept") or 0 for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(max(kept) * 1.15, min(kept) / 1.15)
    places: dict[float, float] = {}
    for level, members in section.groups.items():
        held = [row.mean("kept") for row in members if row.pruned and row.mean("kept")]
        if held:
            places[level] = sum(held) / len(held)
    axes.set_xticks(
        list(places.values()), [f"{percent(level, 2)}\n{place:,.0f} left" for level, place in places.items()]
    )
    axes.minorticks_off()
    axes.set_xlabel("weights removed, and how many are left (logarithmic)", color=INK)


def _name_ends(axes, ends: Sequence[tuple]) -> None:
    """Each curve's label beside the chart at the height where it ends, moved apart just enough to be read."""
    low, high = axes.get_ylim()
    left, right = (math.log(end) for end in axes.get_xlim())
    beyond = math.exp(right + 0.03 * (right - left))
    gap = (high - low) * 0.042
    placed = spread([min(max(y, low), high) for _, y, *_ in ends], gap, low, high)
    for (x, y, label, shade), where in zip(ends, placed, strict=True):
        lead = {"arrowstyle": "-", "color": shade, "linewidth": 0.6, "alpha": 0.45, "shrinkA": 2, "relpos": (0, 0.5)}
        axes.annotate(
            label.replace("$", r"\$"),
            xy=(x or math.exp(right), y),
            xytext=(beyond, where),
            va="center",
            fontsize=9,
            color=shade,
            annotation_clip=False,
            arrowprops=lead,
        )


def _kind(row: StudyRow) -> str:
    if row.elsewhere:
        return chosen_by(Network("", "score", None, None, row.network.objective)).replace(
            CRITERIA["score"], "pruned against another loss"
        )
    return CRITERIA.get(str(row.network.criterion), str(row.network.criterion))
