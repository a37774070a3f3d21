"""Ledgers of bounds as a run folder holds them: verdicts at one eps, and radii, the largest eps of each image.

Files in ``certificates/VARIANT/``: ``eps-EPS.jsonl`` by the recipe's methods, ``eps-EPS-….jsonl`` by others, by other
verifiers or under a time limit, ``radius-….jsonl``. Ledgers of smoothing are read by ``smoothed.py``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from certifiers.errors import InputError, SoundnessError
from certifiers.verdict import Status, Summary, Verdict, read_ledger, summarise
from certprune.reports.headers import HeaderView
from certprune.reports.smoothed import PREFIX

RADIUS_PREFIX = "radius-"


@dataclass(frozen=True)
class LedgerView(HeaderView):
    """One ledger of verdicts with its header."""

    verdicts: list[Verdict] = field(repr=False)

    @property
    def eps(self) -> float:
        return float(self.header["eps"])

    @property
    def limit(self) -> str:
        """The time an image had, e.g. ``10 s an image``; "" where there was no limit."""
        seconds = self.header.get("input_seconds")
        return "" if seconds is None else f"{seconds:g} s an image"

    @property
    def way(self) -> str:
        """What sets ledgers of one network at one eps apart: the methods, and the time an image had."""
        return ", ".join(filter(None, (self.method, self.limit)))

    @property
    def settings(self) -> tuple:
        """What ledgers at one eps have to share before networks are compared by them."""
        return (self.norm, self.way)

    @property
    def seconds(self) -> float:
        return sum(verdict.seconds for verdict in self.verdicts)

    @cached_property
    def indices(self) -> frozenset[int]:
        """Which images of the split are decided."""
        return frozenset(verdict.index for verdict in self.verdicts)

    @cached_property
    def summary(self) -> Summary:
        return summarise(self.verdicts)

    def claims(self) -> dict[int, float]:
        """By image, the eps within which it is proven to be predicted right."""
        return {v.index: self.eps for v in self.verdicts if v.status is Status.certified}

    def refutations(self) -> dict[int, float]:
        """By image, the eps within which a wrong prediction is known: 0 where it is wrong as it is."""
        at = {Status.misclassified: 0.0, Status.falsified: self.eps}
        return {v.index: at[v.status] for v in self.verdicts if v.status in at}


@dataclass(frozen=True)
class RadiusView(HeaderView):
    """One ledger of radii with its header; ``rows`` are :class:`certifiers.radius.RadiusVerdict`."""

    rows: list[Any] = field(repr=False)

    @property
    def largest(self) -> float:
        """Up to which eps was looked."""
        return float(self.header["largest"])

    @property
    def usual(self) -> bool:
        """Whether the methods are the recipe's: others are told by a suffix of the file's name."""
        return self.path.stem == f"{RADIUS_PREFIX}{self.largest:g}-{float(self.header['tolerance']):g}"

    @property
    def settings(self) -> tuple:
        """What sets ledgers of one network apart."""
        return (self.largest, float(self.header["tolerance"]), self.norm, self.method)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def claims(self) -> dict[int, float]:
        return {row.index: row.radius for row in self.rows if row.status is Status.certified}

    def refutations(self) -> dict[int, float]:
        wrong = {row.index: 0.0 for row in self.rows if row.status is Status.misclassified}
        return wrong | {row.index: row.broken for row in self.rows if row.broken is not None}


def read_ledgers(folder: Path, missing: list[str], alarms: list[str]) -> tuple[list[LedgerView], list[RadiusView]]:
    """The ledgers in ``folder``, verdicts by rising eps; what cannot be read is said in ``missing``.

    A ledger whose certificates something contradicts is left out, and that is said in ``alarms``: its own record of
    it, or a wrong prediction that another ledger about the same network and images knows of within that eps.
    """
    verdicts, radii = [], []
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.startswith(PREFIX):
            continue
        radius = path.name.startswith(RADIUS_PREFIX)
        read = _read(path, _read_radii if radius else read_ledger, missing, alarms)
        if read is None or not read[1]:
            continue
        header, rows = read
        if radius and {"largest", "tolerance"} <= header.keys():
            radii.append(RadiusView(path, header, rows))
        elif not radius and "eps" in header:
            verdicts.append(LedgerView(path, header, rows))
    wrong = _contradicted([*verdicts, *radii], alarms)
    verdicts = [view for view in verdicts if view.path not in wrong]
    radii = [view for view in radii if view.path not in wrong]
    return sorted(verdicts, key=lambda ledger: ledger.eps), radii


def main_ledgers(
    found: Sequence[LedgerView], methods: str, missing: list[str]
) -> tuple[list[LedgerView], list[LedgerView]]:
    """Of the ledgers of one network, one for each eps by ``methods`` (joined by ``+``) and no time limit; the others.

    Of several at one eps (a copy, say), the one with the most images, of those about the network that the file of the
    usual name is about: what was moved aside is of an older one. That there is such a one is said in ``missing``.
    """
    own: list[LedgerView] = []
    usual = [ledger for ledger in found if ledger.way == methods]
    for ledger in sorted(usual, key=lambda ledger: (ledger.eps, not _usually_named(ledger), -len(ledger.verdicts))):
        first = next((other for other in own if same_eps(ledger.eps, other.eps)), None)
        if first is None:
            own.append(ledger)
        elif ledger.model != first.model:
            missing.append(
                f"{ledger.path.parent.name}: {ledger.path.name} is about other weights than {first.path.name}, so "
                "it is not counted; move it out of this folder."
            )
        elif len(ledger.verdicts) > len(first.verdicts):
            own[own.index(first)] = ledger
    return own, [ledger for ledger in found if ledger not in own]


def _usually_named(ledger: LedgerView) -> bool:
    return ledger.path.stem == f"eps-{ledger.eps:g}"


def same_eps(one: float, other: float) -> bool:
    """Whether two eps are one and the same, but for the last digits."""
    return abs(one - other) <= 1e-9


def _read_radii(path: Path) -> tuple[dict, list]:
    from certifiers.radius import read_radius_ledger  # most runs hold none

    return read_radius_ledger(path)


def _read(
    path: Path, read: Callable[[Path], tuple[dict, list]], missing: list[str], alarms: list[str]
) -> tuple[dict, list] | None:
    try:
        return read(path)
    except InputError as error:
        missing.append(f"{path.parent.name}: {path.name} cannot be read: {error}")
    except SoundnessError as error:
        alarms.append(str(error))
    return None


def _contradicted(views: Iterable[LedgerView | RadiusView], alarms: list[str]) -> set[Path]:
    """The ledgers that claim what another one refutes: a wrong prediction was seen, so the claim is what is wrong."""
    views, wrong = list(views), set()
    for one in views:
        claims = one.claims()
        for other in views:
            if (other.model, other.images, other.norm) != (one.model, one.images, one.norm):
                continue
            for index, eps in other.refutations().items():
                if claims.get(index, -1.0) >= eps:
                    wrong.add(one.path)
                    alarms.append(
                        f"{one.path.parent.name}: {one.path.name} has image {index} certified within {one.norm} "
                        f"{claims[index]:g}, but {other.path.name} knows a wrong prediction within {eps:g}. None of "
                        f"the certificates in {one.path.name} can be trusted, so it is not counted; please report "
                        "this with the network."
                    )
                    break
    return wrong
