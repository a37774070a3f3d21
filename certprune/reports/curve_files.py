"""Curves from files: ledgers of bounds, of radii and of smoothing, and the logs that smoothing papers publish."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from certifiers.errors import InputError
from certifiers.ledger import ledger_kind
from certifiers.radius import KIND as RADIUS_KIND
from certifiers.radius import read_radius_ledger
from certifiers.smoothing import KIND, read_smoothed_ledger
from certifiers.verdict import read_ledger
from certprune.reports.curves import Curve, certified_radius_curve, ledger_curve, name_curves, smoothed_curve, staircase
from certprune.reports.ledgers import LedgerView, RadiusView
from certprune.reports.look import Network
from certprune.reports.smoothed import SmoothedView

LOG_HEADER = ["idx", "label", "predict", "radius", "correct", "time"]


def read_curves(paths: Sequence[str | Path], norm: str | None = None) -> list[Curve]:
    """Curves of ledgers and smoothing logs in any mixture; ledgers of one network at several eps make one curve.

    With ``norm``, smoothing ledgers are shown by the radii that their own imply in that norm, and labelled so.

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
        kind = ledger_kind(path)
        if kind == RADIUS_KIND:
            curves.append(_radius_curve(path))
            continue
        if kind == KIND:
            smoothed = _read_smoothed_ledger(path)
            curves.append(smoothed_curve(_network(smoothed), smoothed, norm))
            continue
        ledger = _read_ledger(path)
        key = (ledger.model, ledger.header.get("variant"), ledger.images, ledger.norm, ledger.way)
        alike = groups.setdefault(key, [])
        for other in alike:
            if other.eps == ledger.eps:
                raise InputError(
                    f"'{other.path}' and '{path}' are about the same network at the same eps {ledger.eps:g}. "
                    "Give one of them."
                )
        alike.append(ledger)
    curves += [ledger_curve(_network(ledgers[0]), ledgers) for ledgers in groups.values()]
    norms = {curve.norm: curve.label for curve in curves}
    if len(norms) > 1:
        which = " and ".join(f"{norm} ('{name}')" for norm, name in sorted(norms.items()))
        raise InputError(
            f"An eps means something else in each norm, but the given files are in {which}. Draw one chart per norm, "
            "or show what smoothing implies in the other (--norm)."
        )
    return name_curves(curves)


def _radius_curve(path: Path) -> Curve:
    header, rows = read_radius_ledger(path)
    if not rows:
        raise InputError(f"'{path}' holds no radius yet. Certify first: `certprune certify RUN --radius`.")
    return certified_radius_curve(_named(path, header), RadiusView(path, header, rows))


def _network(ledger: LedgerView | SmoothedView) -> Network:
    return _named(ledger.path, ledger.header)


def _named(path: Path, header: dict) -> Network:
    """What the header tells of the network; its variant's default name holds criterion and budget."""
    name = str(header.get("variant") or path.parent.name)
    sparsity = header.get("sparsity")
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


def _read_ledger(path: Path) -> LedgerView:
    header, verdicts = read_ledger(path)
    if not verdicts:
        raise InputError(f"'{path}' holds no verdict yet. Certify first: `certprune certify RUN`.")
    return LedgerView(path, header, verdicts)


def _read_smoothed_ledger(path: Path) -> SmoothedView:
    header, verdicts = read_smoothed_ledger(path)
    if not verdicts:
        raise InputError(f"'{path}' holds no verdict yet. Certify first: `certprune smooth RUN`.")
    return SmoothedView(path, header, verdicts)


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
    return staircase(Network(path.stem), radii, n, (("folder", path.parent.name),))
