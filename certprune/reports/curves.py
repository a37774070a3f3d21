"""Certified accuracy against eps, or against the radius of smoothing certificates.

A ledger of bounds gives one point (and, at eps 0, the clean accuracy, which is what certified accuracy is there).
Smoothing gives the whole curve in one pass: an input counts at every radius up to its own.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from certifiers.errors import InputError
from certifiers.verdict import Accuracy, Status
from certprune.reports.ledgers import LedgerView, RadiusView
from certprune.reports.look import NORMS, Network, labels, order
from certprune.reports.read import RunView
from certprune.reports.rows import Rate, network, rate, rates
from certprune.reports.smoothed import SmoothedView


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
    until: float = math.inf  # how far a stepped curve is known: behind its last point it is 0 up to here
    implied: str = ""  # the norm of the certificates that imply these radii; "" where they are of ``norm`` themselves
    # (topic, text): tell curves with equal labels apart, by the methods, the noise, the seed, the folder.
    notes: tuple[tuple[str, str], ...] = ()


def run_curves(run: RunView) -> list[Curve]:
    """The curves of a run's networks, dense first, then by rising sparsity."""
    return name_curves(ledger_curve(network(variant), variant.ledgers) for variant in run.variants if variant.ledgers)


def smoothed_run_curves(run: RunView, settings: tuple | None = None) -> list[Curve]:
    """The staircases of a run's networks by smoothing, one for each ledger, or for those with these ``settings``.

    All in one norm: where a run has been smoothed in several, that of the recipe's own ledgers.
    """
    views = sorted((view for variant in run.variants for view in variant.smoothed), key=lambda view: not view.usual)
    norms = {view.norm for view in views if settings in (None, view.settings)}
    norm = next((view.norm for view in views if view.norm in norms), None)
    return name_curves(
        smoothed_curve(network(variant), view)
        for variant in run.variants
        for view in variant.smoothed
        if settings in (None, view.settings) and view.norm == norm
    )


def radius_run_curves(run: RunView, settings: tuple | None = None) -> list[Curve]:
    """The staircases of a run's networks from ledgers of radii: all of one norm, or those with these ``settings``."""
    views = [(variant, view) for variant in run.variants for view in variant.radii]
    norm = next((view.norm for _, view in sorted(views, key=lambda pair: not pair[1].usual)), None)
    return name_curves(
        certified_radius_curve(network(variant), view)
        for variant, view in views
        if (view.norm == norm if settings is None else view.settings == settings)
    )


def name_curves(curves: Iterable[Curve]) -> list[Curve]:
    """Order curves by sparsity and give each a label of its own."""
    ordered = sorted(curves, key=lambda curve: (*order(curve.network), curve.notes))
    networks = list(dict.fromkeys(curve.network for curve in ordered))
    names = dict(zip(networks, labels(networks), strict=True))
    texts = [names[curve.network] for curve in ordered]
    named = []
    for curve, text in zip(ordered, texts, strict=True):
        alike = [other for other, name in zip(ordered, texts, strict=True) if name == text]
        extra = f" ({apart})" if len(alike) > 1 and (apart := _apart(curve, alike)) else ""
        implied = f", implied by {NORMS[curve.implied]}" if curve.implied else ""
        label = text + extra + implied
        taken = sum(other.label == label for other in named)
        named.append(replace(curve, label=f"{label} ({taken + 1})" if taken else label))
    return named


def _apart(curve: Curve, alike: Sequence[Curve]) -> str:
    """What the notes say on the topics that tell the curves with its label apart.

    These are all that every such curve has a note on, where they differ; and of others, and the run's folder, what is
    needed further.
    """
    notes = [dict(other.notes) for other in alike]
    topics = list(dict.fromkeys(topic for other in alike for topic, _ in other.notes))
    shared = [topic for topic in topics if topic != "run" and all(topic in each for each in notes)]
    chosen = [topic for topic in shared if len({each[topic] for each in notes}) > 1]

    def kinds(by: list[str]) -> int:
        return len({tuple(each.get(topic) for topic in by) for each in notes})

    for topic in topics:
        if topic not in shared and kinds([*chosen, topic]) > kinds(chosen):
            chosen.append(topic)
    own = dict(curve.notes)
    return ", ".join(own[topic] for topic in topics if topic in chosen and topic in own)


def rate_at(curve: Curve, radius: float) -> Rate:
    """Certified accuracy of a stepped curve at ``radius``: the fraction right with at least that radius."""
    found = next((point.certified for point in curve.points if point.eps >= radius), None)
    return found or rate(Accuracy(0, curve.points[-1].n))


def accuracy_at(curve: Curve, radius: float) -> float:
    """The value of :func:`rate_at` alone."""
    return rate_at(curve, radius).value


def distance_label(curves: Sequence[Curve]) -> str:
    """What the horizontal axis of these curves shows: an eps, or the radius of smoothing certificates."""
    words = "Radius" if all(curve.stepped and math.isinf(curve.until) for curve in curves) else "eps"
    return f"{words} ({NORMS.get(curves[0].norm, curves[0].norm)}, pixels in [0, 1])"


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


def ledger_curve(which: Network, ledgers: Iterable[LedgerView]) -> Curve:
    """One network's certified accuracy at the eps of each ledger, and at 0 its clean accuracy."""
    ledgers = sorted(ledgers, key=lambda ledger: ledger.eps)
    points = {}
    for ledger in ledgers:
        clean, attack, certified = rates(ledger.summary)
        points[ledger.eps] = Point(ledger.eps, len(ledger.verdicts), certified, attack)
    if 0.0 not in points:
        fullest = max(ledgers, key=lambda ledger: len(ledger.verdicts))
        clean = rates(fullest.summary)[0]
        points[0.0] = Point(0.0, len(fullest.verdicts), clean, clean)
    first, seed = ledgers[0], ledgers[0].header.get("seed")
    notes = [("method", first.method)]
    notes += [("limit", first.limit)] if first.limit else []
    notes.append(("seed", f"seed {seed}") if seed is not None else ("images", first.images or first.path.parent.name))
    ordered = tuple(points[eps] for eps in sorted(points))
    return Curve(which.name, which, ledgers[0].norm, ordered, notes=(*notes, *_run(first.path)))


def _run(path: Path) -> tuple[tuple[str, str], ...]:
    """A note on the run that a ledger lies in, if it does."""
    folders = path.resolve().parents
    inside = len(folders) > 2 and folders[1].name == "certificates"
    return (("run", folders[2].name),) if inside else ()


def smoothed_curve(which: Network, view: SmoothedView, norm: str | None = None) -> Curve:
    """The staircase of a smoothing ledger; wrong and abstained inputs never count.

    In another ``norm`` than the ledger's it is of the radii that its own imply there.
    """
    radii = [verdict.radius for verdict in view.verdicts if verdict.status is Status.certified]
    header = view.header
    notes = (
        ("noise", "uniform noise" if view.norm == "l1" else "Gaussian noise"),
        ("sigma", f"sigma {view.sigma:g}"),
        *((key, f"{key} {header.get(key)}") for key in ("n", "alpha", "seed")),
        ("rule", view.rule or "fixed n"),
        *_run(view.path),
    )
    implied = norm not in (None, view.norm)
    if implied:
        radii = [_implied(view, radius, norm) for radius in radii]
    curve = staircase(which, radii, len(view.verdicts), notes, norm or view.norm)
    return replace(curve, implied=view.norm) if implied else curve


def _implied(view: SmoothedView, radius: float, norm: str) -> float:
    from certifiers.smoothing import implied_radius

    if "pixels" not in view.header:
        raise InputError(
            f"'{view.path}' does not say how many pixels an image has (it is of an older version), so what its radii "
            f'imply in {norm} is not known. Add "pixels" to its first line, or certify again.'
        )
    return implied_radius(radius, view.norm, norm, int(view.header["pixels"]))


def certified_radius_curve(which: Network, view: RadiusView) -> Curve:
    """The staircase of a ledger of certified radii; an image predicted right counts at every eps up to its radius.

    At each of its points also the attack accuracy: right, and not broken at that eps or a smaller one.
    """
    header, rows = view.header, view.rows
    right = [row for row in rows if row.prediction == row.label]
    notes = [("kind", "radii"), ("method", view.method)]
    notes += [(key, f"{key} {header[key]}") for key in ("tolerance", "seed") if key in header]
    curve = staircase(which, [row.radius for row in right], len(rows), (*notes, *_run(view.path)), view.norm)
    last = curve.points[-1].eps
    whole = math.isclose(last, view.largest, rel_tol=1e-6)  # radii are in the network's float type
    curve = replace(curve, until=last if whole else view.largest)
    if header.get("attack_steps") == 0:
        return curve
    points = []
    for point in curve.points:
        held = sum(row.broken is None or row.broken > point.eps for row in right)
        points.append(replace(point, attack=rate(Accuracy(held, len(rows)))))
    return replace(curve, points=tuple(points))


def staircase(
    which: Network, radii: Iterable[float], n: int, notes: tuple[tuple[str, str], ...], norm: str = "l2"
) -> Curve:
    """The curve of ``n`` inputs of which those predicted right are certified within ``radii`` (``norm``, pixels)."""
    radii = sorted(radii)
    points = []
    for place, radius in enumerate(radii):
        if place == 0 or radius > radii[place - 1]:  # all from here on reach this radius
            points.append(Point(radius, n, rate(Accuracy(len(radii) - place, n))))
    if not points or points[0].eps > 0:
        points.insert(0, Point(0.0, n, rate(Accuracy(len(radii), n))))
    return Curve(which.name, which, norm, tuple(points), stepped=True, notes=notes)
