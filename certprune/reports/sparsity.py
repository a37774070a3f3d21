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
from certprune.reports.rows import Rate, network, rates

FIGURES = ("clean", "attack", "certified")
MANY = 16  # networks; more lines than these in one chart cannot be told apart


@dataclass(frozen=True)
class SparsityPoint:
    """One network's accuracies at the run's main eps; ``sparsity`` is measured over all prunable weights."""

    variant: str
    sparsity: float
    n: int
    clean: Rate
    attack: Rate
    certified: Rate


@dataclass(frozen=True)
class SparsityLine:
    """One way of pruning at several sparsities, rising; ``level``: a network that is not pruned, one point."""

    label: str
    network: Network
    points: tuple[SparsityPoint, ...]
    level: bool = False


def sparsity_lines(run: RunView, eps: float | None = None) -> list[SparsityLine]:
    """The lines at ``eps`` (default: the main eps): not pruned, then learned ways, then baselines.

    Empty unless some way of pruning was certified at two sparsities or more.
    """
    eps = run.main_eps if eps is None else eps
    held: dict[tuple, list[tuple[Variant, SparsityPoint]]] = {}
    for variant in run.variants:
        point = None if eps is None else _point(variant, eps)
        if point is not None and variant.name != "pretrain":
            way = (variant.name,) if not variant.criterion else (variant.objective, variant.criterion, variant.budget)
            held.setdefault(way, []).append((variant, point))
    budgets = len({variant.budget for found in held.values() for variant, _ in found if variant.criterion}) > 1
    lines = [_line(found, budgets) for found in held.values()]
    if not any(len(line.points) > 1 for line in lines):
        return []
    return sorted(lines, key=lambda line: (not line.level, line.network.criterion in BASELINES))  # stable


def many_networks(run: RunView) -> bool:
    """Whether charts with a line for each network would be unreadable, and those against sparsity stand for them."""
    return sum(bool(variant.ledgers) for variant in run.variants) > MANY and bool(sparsity_lines(run))


def line_styles(lines: Sequence[SparsityLine]) -> list[Style]:
    """Colour says the objective where several were used, else the budget; the line style says the criterion.

    A level is drawn in the ink of networks that are not pruned, and so is a baseline that no objective chose.
    """
    several = any(line.network.objective for line in lines if not line.level)
    seen: dict[str | None, int] = {}
    found = []
    for line in lines:
        each, slot = line.network, 0
        key = each.objective if several else each.budget
        if not line.level and not (several and each.criterion in BASELINES):
            slot = seen.setdefault(key, 1 + len(seen) % (len(LIGHT) - 1))
        dash = (2, 3) if line.level else DASHES.get(each.criterion, ())
        found.append(Style(slot, dash, MARKERS.get(each.budget, "D")))
    return found


def sparsity_csv(lines: Sequence[SparsityLine]) -> str:
    """The lines' values at full precision, one row a network."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{name}{end}" for name in FIGURES for end in ("", "_lower", "_upper")]
    writer.writerow(["line", "variant", "objective", "criterion", "budget", "sparsity", "n", *ends])
    for line in lines:
        for point in line.points:
            about = (point.variant, line.network.objective, line.network.criterion, line.network.budget)
            found = [getattr(point, name) for name in FIGURES]
            values = [value for rate in found for value in (rate.value, rate.lower, rate.upper)]
            writer.writerow([line.label, *(part or "" for part in about), point.sparsity, point.n, *values])
    return out.getvalue()


def _point(variant: Variant, eps: float) -> SparsityPoint | None:
    ledger = variant.ledger(eps)
    sparsity = (variant.size or {}).get("total", variant.sparsity)
    if ledger is None or sparsity is None:
        return None
    return SparsityPoint(variant.name, sparsity, len(ledger.verdicts), *rates(ledger.summary))


def _line(found: list[tuple[Variant, SparsityPoint]], budgets: bool) -> SparsityLine:
    each = network(found[0][0])
    points = tuple(sorted((point for _, point in found), key=lambda point: point.sparsity))
    if not each.criterion:
        return SparsityLine(each.name, each, points, level=True)
    return SparsityLine(chosen_by(each, budgets), each, points)
