"""What was decided about each input, where that is kept, and what it sums up to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from certifiers import journal
from certifiers.errors import InputError, SoundnessError
from certifiers.fingerprint import model_hash
from certifiers.journal import REMEDY

__all__ = ["Accuracy", "Ledger", "Status", "Summary", "Verdict", "model_hash", "read_ledger", "summarise"]

VERSION = 1

# What makes two ledgers the same experiment. Other header keys are notes.
IDENTITY = ("ledger", "model", "data", "split", "eps", "norm", "method", "attack_steps", "attack_restarts")


class Status(str, Enum):
    """The outcome for one input; only `certified` counts as certified."""

    certified = "certified"  # right, and proven that no input of the threat set changes the prediction
    falsified = "falsified"  # right, but an input of the threat set with another prediction is known
    misclassified = "misclassified"  # wrong already when clean
    unknown = "unknown"  # neither proven nor broken by the methods that were asked
    timeout = "timeout"  # the time limit ended the search
    abstained = "abstained"  # the smoothed classifier made no prediction


@dataclass(frozen=True)
class Verdict:
    """The outcome for one input of a data set.

    `index` is its number in the data set. `method` decided: "clean" for misclassified, "attack" for
    falsified, else the certifier, for unknown the last one tried. `margin` is a proven lower bound of the
    smallest logit[label] - logit[j] over the threat set (positive if certified), or None where there is none.
    `seconds` is the input's equal share of the time of its batch.
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


class Ledger:
    """The append-only file of verdicts about one model, on one data set, against one threat set.

    Opening makes the file, or goes on with what is there after cutting off a last line that a kill left
    incomplete. No index ever stands there twice. A batch of verdicts is on the disk when :meth:`append`
    returns. Use it in a `with` block, or call :meth:`close`.

    Args:
        path: the file; its folder is made if need be.
        header: what the verdicts are about, JSON values: "model" (:func:`model_hash`), "data", "split",
            "eps", "norm", "method", "attack_steps", "attack_restarts" as far as they apply, and any notes.

    Raises:
        InputError: the file is about something else (one of these keys differs), is damaged, is no ledger, or
            is being written by another process. It is left unchanged.
        SoundnessError: a certifier was contradicted when this ledger was written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        wanted = json.loads(json.dumps({"ledger": VERSION, **header}))  # as it will be read back
        if not self.path.exists():
            journal.create(self.path, wanted)
        self._journal = journal.Appender(self.path)
        try:
            rows, end = journal.read(self.path)
            self.header, self._verdicts = _parse(self.path, rows)
            _check_same(self.path, self.header, wanted)
            self._journal.cut(end)
        except BaseException:
            self._journal.close()
            raise
        self._decided = {verdict.index for verdict in self._verdicts}

    @property
    def verdicts(self) -> list[Verdict]:
        """All verdicts, in the order they were written."""
        return list(self._verdicts)

    @property
    def decided(self) -> set[int]:
        """The indices that have a verdict, of whatever status; they need not be asked again."""
        return set(self._decided)

    def append(self, verdicts: Sequence[Verdict]) -> None:
        """Write these verdicts and sync them to the disk; all of them or, on an error, none.

        Raises InputError for an index that has a verdict already, and for another eps or norm than the
        header's.
        """
        new: set[int] = set()
        for verdict in verdicts:
            if verdict.index in self._decided or verdict.index in new:
                raise InputError(
                    f"Input {verdict.index} has a verdict already in the ledger {self.path}; skip the inputs "
                    "in Ledger.decided. Nothing was written."
                )
            for key in ("eps", "norm"):
                if key in self.header and getattr(verdict, key) != self.header[key]:
                    raise InputError(
                        f"The ledger {self.path} is for {key} {self.header[key]}, but a verdict for {key} "
                        f"{getattr(verdict, key)} came. Give that threat set its own ledger; nothing was "
                        "written."
                    )
            new.add(verdict.index)
        self._journal.append(asdict(verdict) for verdict in verdicts)
        self._verdicts.extend(verdicts)
        self._decided |= new

    def record_contradiction(self, details: Mapping[str, Any]) -> None:
        """Write down that a certifier was contradicted; from then on the ledger cannot be opened any more."""
        self._journal.append([{"contradiction": dict(details)}])

    def close(self) -> None:
        """Release the file to other processes."""
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ledger(path: str | Path) -> tuple[dict[str, Any], list[Verdict]]:
    """The header and verdicts of a ledger, without changing it; an incomplete last line is left out.

    Raises InputError for a file that is missing, damaged (naming the line) or no ledger, and SoundnessError
    where a contradicted certifier is on record.
    """
    path = Path(path)
    return _parse(path, journal.read(path)[0])


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


@dataclass(frozen=True)
class Summary:
    """What `n` verdicts sum up to; the true robust accuracy lies between `certified` and `attack`."""

    n: int
    clean: Accuracy  # the clean prediction is right
    certified: Accuracy  # right and proven
    attack: Accuracy  # right and not falsified


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


_NOT_CORRECT = (Status.misclassified, Status.abstained)


def _parse(path: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Verdict]]:
    header = rows[0]
    if header.get("ledger") != VERSION:
        raise InputError(
            f'{path} is no ledger of verdicts: its first line should hold "ledger": {VERSION}. Nothing was '
            "changed; give the path of a ledger, or of a file that does not exist yet."
        )
    verdicts: list[Verdict] = []
    seen: set[int] = set()
    for number, row in enumerate(rows[1:], start=2):
        if "contradiction" in row:
            _tainted(path, row["contradiction"])
        verdict = _verdict(path, number, row)
        if verdict.index in seen:
            raise InputError(
                f"Line {number} of the ledger {path} gives input {verdict.index} a second verdict. {REMEDY}"
            )
        seen.add(verdict.index)
        verdicts.append(verdict)
    return header, verdicts


def _verdict(path: Path, number: int, row: dict[str, Any]) -> Verdict:
    try:
        values = {field.name: row[field.name] for field in fields(Verdict)}
        return Verdict(**{**values, "index": int(values["index"]), "status": Status(values["status"])})
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"Line {number} of the ledger {path} is no verdict ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def _tainted(path: Path, details: Mapping[str, Any]) -> NoReturn:
    raise SoundnessError(
        f"The ledger {path} records that an input contradicted a certifier ({details}), so none "
        "of its certificates can be trusted. Mend the certifier, move the file away and certify again."
    )


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in IDENTITY:
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"The ledger {path} holds verdicts for another {key}: {found.get(key)!r} there, "
                f"{wanted.get(key)!r} now. Give another path, or move that file away to start anew; nothing "
                "was changed."
            )
