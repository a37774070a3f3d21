"""What was decided about each input, where that is kept, and what it sums up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from certifiers.errors import InputError
from certifiers.fingerprint import model_hash
from certifiers.ledger import RowLedger

Row = TypeVar("Row")

__all__ = [
    "Accuracy",
    "ImageLedger",
    "Ledger",
    "Status",
    "Summary",
    "Verdict",
    "model_hash",
    "read_ledger",
    "summarise",
]


class Status(str, Enum):
    """The outcome for one input; only `certified` counts as certified."""

    certified = "certified"  # right, and proven that no input of the threat set changes the prediction
    falsified = "falsified"  # right, but an input of the threat set with another prediction is known
    misclassified = "misclassified"  # wrong already when clean
    unknown = "unknown"  # neither proven nor broken by the methods that were asked
    timeout = "timeout"  # the time limit ended the search
    abstained = "abstained"  # the smoothed classifier made no prediction


UNDECIDED = (Status.unknown, Status.timeout)
_NOT_CORRECT = (Status.misclassified, Status.abstained)


@dataclass(frozen=True)
class Verdict:
    """The outcome for one input of a data set.

    `index` is its number in the data set. `method` decided: "clean" for misclassified; for falsified "attack", or the
    method that found the counterexample; else the certifier, for unknown and timeout the last one tried. `margin` is
    a proven lower bound of the smallest logit[label] - logit[j] over the threat set (positive if certified), or None
    where there is none.
    `seconds` is the input's time: of every stage it went through, an equal share of that stage's time for its batch.
    `stages` has the seconds by stage ("clean", "attack", then the methods); it is empty in ledgers of old.
    """

    index: int
    label: int
    prediction: int
    status: Status
    eps: float
    norm: str
    method: str
    margin: float | None
    seconds: float
    stages: dict[str, float] = field(default_factory=dict, compare=False)


class ImageLedger(RowLedger[Row]):
    """A ledger of images: the key "images" of its header is a digest of them all, which must be the same to go on.

    A seed or a fraction parts a data set anew, under the same name. Headers of old have no such key, and are taken for
    what the others say; the labels of their rows can still tell.
    """

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        here, now = self.header.get("images"), wanted.get("images")
        super()._check_same({**wanted, "images": here})
        if here is not None and now is not None and here != now:
            raise InputError(
                f"The ledger {self.path} holds verdicts about other images: the digest of its {_told(self.header)} is "
                f"{here}, but that of the {_told(wanted)} now is {now}. The data differ, or the seed and fractions "
                "that part them; nothing was changed. Ask with the run, or the seed, that the ledger was made with, or "
                "move the file away to start anew."
            )


def _told(header: Mapping[str, Any]) -> str:
    return " ".join([*(str(header[key]) for key in ("data", "split") if header.get(key)), "images"])


class Ledger(ImageLedger[Verdict]):
    """The append-only file of verdicts about one model, on one data set, against one threat set.

    Args:
        path: the file; its folder is made if need be.
        header: what the verdicts are about, JSON values: "model" (:func:`model_hash`), "data", "split",
            "images", "eps", "norm", "method", "attack_steps", "attack_restarts", "input_seconds", of another verifier
            its command line "external" and its "timeout", as far as they apply, and any notes.
    """

    row = Verdict
    kind = None
    identity = (
        "model", "data", "split", "images", "eps", "norm", "method", "attack_steps", "attack_restarts", "input_seconds",
        "external", "timeout",
    )  # fmt: skip
    repeated = ("eps", "norm")

    @classmethod
    def typed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "index": int(values["index"]), "status": Status(values["status"])}

    @classmethod
    def flaws(cls, header: Mapping[str, Any], rows: Sequence[Verdict]) -> Iterator[tuple[int, str]]:
        yield from super().flaws(header, rows)
        for place, row in enumerate(rows):
            right = row.prediction == row.label
            if right is (row.status in _NOT_CORRECT):
                yield place, f"it is {row.status.value} with prediction {row.prediction} and label {row.label}"
            if row.status is Status.certified and row.margin is not None and not 0 < row.margin < math.inf:
                yield place, f"it is certified with a margin of {row.margin}, which should be above 0"

    def settle(self, verdict: Verdict) -> None:
        """Put this verdict in the place of the undecided one that its input has, and sync it to the disk.

        Raises InputError where the input has none, or one that is not among :data:`UNDECIDED`.
        """
        place = next((i for i, row in enumerate(self._rows) if row.index == verdict.index), None)
        if place is None or self._rows[place].status not in UNDECIDED:
            raise InputError(
                f"The ledger {self.path} has no undecided verdict for input {verdict.index} that another one could "
                "take the place of. Nothing was written."
            )
        rows = [*self._rows[:place], verdict, *self._rows[place + 1 :]]
        self._check([verdict])
        self._journal.rewrite([self.header, *map(asdict, rows)])
        self._rows = rows


def read_ledger(path: str | Path) -> tuple[dict[str, Any], list[Verdict]]:
    """The header and verdicts of a ledger, without changing it; an incomplete last line is left out.

    Raises InputError for a file that is missing, damaged (naming the line), no ledger or one of another kind, and
    SoundnessError where a contradicted certifier is on record.
    """
    return Ledger.read(path)


@dataclass(frozen=True)
class Accuracy:
    """`count` of `n` inputs, the fraction `value`, and its two-sided 95 % Wilson interval `low` to `high`."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def low(self) -> float:
        return self._interval[0]

    @property
    def high(self) -> float:
        return self._interval[1]

    @cached_property
    def _interval(self) -> tuple[float, float]:
        from statsmodels.stats.proportion import proportion_confint  # slow to import, and only needed here

        low, high = proportion_confint(self.count, self.n, alpha=0.05, method="wilson")
        return float(low), float(high)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Summary:
    """What `n` verdicts sum up to; the true robust accuracy lies between `certified` and `attack`."""

    n: int
    clean: Accuracy  # the clean prediction is right
    certified: Accuracy  # right and proven
    attack: Accuracy  # right and not falsified

    def __str__(self) -> str:
        return f"{self.n} images, clean {self.clean}, attack {self.attack}, certified {self.certified}"


def summarise(verdicts: Sequence[Verdict]) -> Summary:
    """Count clean, certified and attack accuracy; InputError where there is no verdict to count."""
    if not verdicts:
        raise InputError("Accuracies need at least one verdict, but none came. Certify some inputs first.")
    correct = [v for v in verdicts if v.prediction == v.label and v.status not in _NOT_CORRECT]
    n = len(verdicts)
    return Summary(
        n=n,
        clean=Accuracy(len(correct), n),
        certified=Accuracy(sum(v.status is Status.certified for v in correct), n),
        attack=Accuracy(sum(v.status is not Status.falsified for v in correct), n),
    )
