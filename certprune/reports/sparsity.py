"""Accuracy against sparsity, from the ledgers of one run: what each way of pruning leaves of a network.

A line is one way of choosing the kept weights (criterion, budget, and the objective that scores were learned against)
over the sparsities that the run has of it. The network that was not pruned is the level they are to be held against.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from certprune.reports.compare import BASELINES
from certprune.reports.look import DASHES, LIGHT, MARKERS, Network, Style, chosen_by
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import Rate, network, rate, rates
from certprune.reports.smoothed import accuracy_at, ledger_at, shown_radii, smoothing_settings
from certprune.reports.smoothed_rows import main_radius

MANY = 16  # networks; more lines than these in one chart cannot be told apart


@dataclass(frozen=True)
class Panel:
    """One accuracy to draw; ``radius``: the ℓ2 radius of smoothing certificates with noise of ``sigma``, in pixels."""

    key: str
    title: str
    sigma: float | None = None
    radius: float | None = None


BY_BOUNDS = (
    Panel("clean", "Clean accuracy"),
    Panel("attack", "Attack accuracy"),
    Panel("certified", "Certified accuracy"),
)


@dataclass(frozen=True)
class SparsityPoint:
    """One network's accuracies by the key of their panel; ``sparsity`` is measured over all prunable weights."""

    variant: str
    sparsity: float
    n: int
    rates: dict[str, Rate]


@dataclass(frozen=True)
class SparsityLine:
    """One way of pruning at several sparsities, rising; ``level``: a network that is not pruned, one point."""

    label: str
    network: Network
    points: tuple[SparsityPoint, ...]
    level: bool = False


def sparsity_panels(run: RunView) -> list[Panel]:
    """What there is to draw: by bounds at the main eps, and by smoothing with the recipe's sigma.

    Of the radii, 0 (the accuracy of the smoothed classifier) and the one that cards and differences are about.
    """
    panels = list(BY_BOUNDS) if run.main_eps is not None else []
    found = sorted({ledger.sigma for variant in run.variants for ledger in variant.smoothed if ledger.usual})
    if found:
        planned = smoothing_settings(run.config).get("sigma")
        sigma = planned if planned in found else found[0]
        radius = main_radius(shown_radii(run.config))
        panels.append(Panel("smoothed", f"Accuracy under noise of {sigma:g}", sigma, 0.0))
        norm = "ℓ1" if smoothing_settings(run.config).get("noise") == "uniform" else "ℓ2"
        panels.append(Panel("radius", f"Certified at {norm} radius {radius:g}", sigma, radius))
    return panels


def sparsity_lines(run: RunView) -> list[SparsityLine]:
    """The run's lines: not pruned, then learned ways, then baselines.

    Empty unless some way of pruning was certified at two sparsities or more.
    """
    panels = sparsity_panels(run)
    held: dict[tuple, list[tuple[Variant, SparsityPoint]]] = {}
    for variant in run.variants:
        point = _point(run, variant, panels)
        if point is not None and variant.name != "pretrain":
            way = variant.objective, variant.criterion, variant.budget, variant.how
            held.setdefault(way if variant.criterion else (variant.name,), []).append((variant, point))
    budgets = len({variant.budget for found in held.values() for variant, _ in found if variant.criterion}) > 1
    lines = [_line(found, budgets) for found in held.values()]
    if not any(len(line.points) > 1 for line in lines):
        return []
    return sorted(lines, key=lambda line: (not line.level, line.network.criterion in BASELINES))  # stable


def many_networks(run: RunView) -> bool:
    """Whether charts with a line for each network would be unreadable, and those against sparsity stand for them."""
    return sum(bool(variant.ledgers or variant.smoothed) for variant in run.variants) > MANY and bool(
        sparsity_lines(run)
    )


def line_styles(lines: Sequence[SparsityLine]) -> list[Style]:
    """Colour says the objective where several were used, else budget and schedule; the line style says the criterion.

    A level is drawn in the ink of networks that are not pruned, and so is a baseline that no objective chose.
    """
    several = any(line.network.objective for line in lines if not line.level)
    seen: dict[object, int] = {}
    found = []
    for line in lines:
        each, slot = line.network, 0
        key = each.objective if several else (each.budget, each.how)
        if not line.level and not (several and each.criterion in BASELINES):
            slot = seen.setdefault(key, 1 + len(seen) % (len(LIGHT) - 1))
        dash = (2, 3) if line.level else DASHES.get(each.criterion, ())
        found.append(Style(slot, dash, MARKERS.get(each.budget, "D")))
    return found


def sparsity_csv(run: RunView) -> str:
    """The lines' values at full precision, one row a network; empty where a figure was not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    panels = sparsity_panels(run)
    names = [panel.key if panel.radius is None else f"smoothed_{panel.sigma:g}_at_{panel.radius:g}" for panel in panels]
    ends = [f"{name}{end}" for name in names for end in ("", "_lower", "_upper")]
    writer.writerow(["line", "variant", "objective", "criterion", "budget", "sparsity", "n", *ends])
    for line in sparsity_lines(run):
        for point in line.points:
            about = (point.variant, line.network.objective, line.network.criterion, line.network.budget)
            found = [point.rates.get(panel.key, Rate("", "", "")) for panel in panels]
            values = [value for rate in found for value in (rate.value, rate.lower, rate.upper)]
            writer.writerow([line.label, *(part or "" for part in about), point.sparsity, point.n, *values])
    return out.getvalue()


def _point(run: RunView, variant: Variant, panels: Sequence[Panel]) -> SparsityPoint | None:
    sparsity = (variant.size or {}).get("total", variant.sparsity)
    ledger = None if run.main_eps is None else variant.ledger(run.main_eps)
    found = {} if ledger is None else dict(zip(("clean", "attack", "certified"), rates(ledger.summary), strict=True))
    n = 0 if ledger is None else len(ledger.verdicts)
    for panel in panels:
        view = None if panel.sigma is None else ledger_at(variant.smoothed, panel.sigma)
        if view is not None:
            found[panel.key] = rate(accuracy_at(view, panel.radius))
            n = n or len(view.verdicts)
    return SparsityPoint(variant.name, sparsity, n, found) if found and sparsity is not None else None


def _line(found: list[tuple[Variant, SparsityPoint]], budgets: bool) -> SparsityLine:
    each = network(found[0][0])
    points = tuple(sorted((point for _, point in found), key=lambda point: point.sparsity))
    if not each.criterion:
        return SparsityLine(each.name, each, points, level=True)
    return SparsityLine(chosen_by(each, budgets), each, points)
