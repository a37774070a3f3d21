"""Certified accuracy against eps, read from ledgers or from the logs that smoothing papers publish.

A ledger gives one point (and, at eps 0, the clean accuracy, which is what certified accuracy is there). A smoothing log
gives the whole curve: an input counts at every radius up to its own.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from certifiers.errors import InputError
from certifiers.verdict import Accuracy, read_ledger
from certprune.reports.look import Network, labels, order
from certprune.reports.read import LedgerView, RunView
from certprune.reports.rows import Rate, network, rate, rates

LOG_HEADER = ["idx", "label", "predict", "radius", "correct", "time"]


@dataclass(frozen=True)
class Point:
    """Certified accuracy at one eps over ``n`` images; ``attack`` where it is known."""

    eps: float
    n: int
    certified: Rate
    attack: Rate | None = None


@dataclass(frozen=True)
class Curve:
    """One network's points by rising eps. ``stepped``: exact between the points too (a staircase, from radii)."""

    label: str
    network: Network
    norm: str
    points: tuple[Point, ...]
    stepped: bool = False
    note: str = ""  # tells curves with equal labels apart: the seed, the data, the folder


def run_curves(run: RunView) -> list[Curve]:
    """The curves of a run's networks, dense first, then by rising sparsity."""
    return name_curves(_ledger_curve(network(variant), variant.ledgers) for variant in run.variants if variant.ledgers)


def read_curves(paths: Sequence[str | Path]) -> list[Curve]:
    """Curves of ledgers and smoothing logs in any mixture; ledgers of one network at several eps make one curve.

    Raises InputError for no paths, an unknown format, an empty file, or norms that cannot share an axis.
    """
    if not paths:
        raise InputError("No ledger was given. Give at least one, e.g. runs/demo/certificates/dense/eps-0.1.jsonl.")
    groups: dict[tuple, list[LedgerView]] = {}
    curves = []
    for path in dict.fromkeys(map(Path, paths)):
        if _is_log(path):
            curves.append(_log_curve(path))
            continue
        ledger = _read_ledger(path)
        key = (ledger.model, ledger.header.get("variant"), ledger.images, ledger.norm, ledger.method)
        alike = groups.setdefault(key, [])
        for other in alike:
            if other.eps == ledger.eps:
                raise InputError(
                    f"'{other.path}' and '{path}' are about the same network at the same eps {ledger.eps:g}. "
                    "Give one of them."
                )
        alike.append(ledger)
    curves += [_ledger_curve(_network(ledgers[0]), ledgers) for ledgers in groups.values()]
    norms = {curve.norm: curve.label for curve in curves}
    if len(norms) > 1:
        which = " and ".join(f"{norm} ('{name}')" for norm, name in sorted(norms.items()))
        raise InputError(
            f"An eps means something else in each norm, but the given files are in {which}. Draw one chart per norm."
        )
    return name_curves(curves)


def name_curves(curves: Iterable[Curve]) -> list[Curve]:
    """Order curves by sparsity and give each a label of its own."""
    ordered = sorted(curves, key=lambda curve: (*order(curve.network), curve.note))
    networks = list(dict.fromkeys(curve.network for curve in ordered))
    names = dict(zip(networks, labels(networks), strict=True))
    texts = [names[curve.network] for curve in ordered]
    named = []
    for curve, text in zip(ordered, texts, strict=True):
        alike = [other for other, name in zip(ordered, texts, strict=True) if name == text]
        extra = f" ({curve.note or len(named) + 1})" if len(alike) > 1 else ""
        named.append(replace(curve, label=text + extra))
    return named


def accuracy_at(curve: Curve, radius: float) -> float:
    """Certified accuracy of a stepped curve at ``radius``: the fraction right with at least that radius."""
    return next((point.certified.value for point in curve.points if point.eps >= radius), 0.0)


def curves_csv(curves: Sequence[Curve]) -> str:
    """One line a point, at full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "network",
            "variant",
            "sparsity",
            "norm",
            "eps",
            "n",
            "certified",
            "certified_lower",
            "certified_upper",
        ]
        + ["attack", "attack_lower", "attack_upper"]
    )
    for curve in curves:
        for point in curve.points:
            attack = point.attack or Rate("", "", "")
            writer.writerow(
                [curve.label, curve.network.name, curve.network.sparsity, curve.norm, point.eps, point.n]
                + [point.certified.value, point.certified.lower, point.certified.upper]
                + [attack.value, attack.lower, attack.upper]
            )
    return out.getvalue()


def _network(ledger: LedgerView) -> Network:
    """What the header tells of the network; its variant's default name holds criterion and budget."""
    name = str(ledger.header.get("variant") or ledger.path.parent.name)
    sparsity = ledger.header.get("sparsity")
    parts = name.split("-")
    if len(parts) == 3 and sparsity:
        return Network(name, parts[0], parts[1], _stated(parts[2], sparsity))
    return Network(name, sparsity=sparsity)


def _stated(text: str, measured: float) -> float:
    """The sparsity asked for, as the variant's name says it, where it agrees with the one measured."""
    try:
        stated = float(text)
    except ValueError:
        return measured
    return stated if math.isclose(stated, measured, abs_tol=5e-3) else measured


def _ledger_curve(which: Network, ledgers: Iterable[LedgerView]) -> Curve:
    ledgers = sorted(ledgers, key=lambda ledger: ledger.eps)
    points = {}
    for ledger in ledgers:
        clean, attack, certified = rates(ledger.summary)
        points[ledger.eps] = Point(ledger.eps, len(ledger.verdicts), certified, attack)
    if 0.0 not in points:
        fullest = max(ledgers, key=lambda ledger: len(ledger.verdicts))
        clean = rates(fullest.summary)[0]
        points[0.0] = Point(0.0, len(fullest.verdicts), clean, clean)
    seed = ledgers[0].header.get("seed")
    note = f"seed {seed}" if seed is not None else ledgers[0].images or ledgers[0].path.parent.name
    ordered = tuple(points[eps] for eps in sorted(points))
    return Curve(which.name, which, ledgers[0].norm, ordered, note=note)


def _read_ledger(path: Path) -> LedgerView:
    header, verdicts = read_ledger(path)
    if not verdicts:
        raise InputError(f"'{path}' holds no verdict yet. Certify first: `certprune certify RUN`.")
    return LedgerView(path, header, verdicts)


def _is_log(path: Path) -> bool:
    """Tell a smoothing log from a ledger by the first line. Raises InputError if it is neither."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = lines.readline().strip()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}. Give a ledger or a smoothing log.") from error
    except UnicodeDecodeError:
        first = "(binary)"
    if first.split("\t") == LOG_HEADER:
        return True
    if first.startswith("{") and '"ledger"' in first:
        return False
    what = "is empty" if not first else "is neither"
    raise InputError(
        f"'{path}' {what}. Expected a ledger of certprune (JSON lines, the first with the key \"ledger\") or a "
        f"tab-separated log with the header {' '.join(LOG_HEADER)}."
    )


def _log_curve(path: Path) -> Curve:
    """The staircase of a log. A radius there is in l2; wrong and abstained inputs never count."""
    radii, n = [], 0
    with path.open(encoding="utf-8", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines, delimiter="\t"), start=2):
            try:
                radius, correct = float(record["radius"]), int(record["correct"])
            except (TypeError, ValueError):
                correct, radius = -1, math.nan
            if correct not in (0, 1) or math.isnan(radius):
                raise InputError(
                    f"Line {number} of '{path}' should hold a number as radius and 0 or 1 as correct, but holds "
                    f"{record['radius']!r} and {record['correct']!r}. Mend or remove the line."
                )
            n += 1
            if correct:
                radii.append(radius)
    if not n:
        raise InputError(f"'{path}' holds no input, only its header. Give the log of a finished certification.")
    radii.sort()
    points = []
    for place, radius in enumerate(radii):
        if place == 0 or radius > radii[place - 1]:  # all from here on reach this radius
            points.append(Point(radius, n, rate(Accuracy(len(radii) - place, n))))
    if not points or points[0].eps > 0:
        points.insert(0, Point(0.0, n, rate(Accuracy(len(radii), n))))
    return Curve(path.stem, Network(path.stem), "l2", tuple(points), stepped=True, note=path.parent.name)
