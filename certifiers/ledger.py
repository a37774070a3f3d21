"""The append-only file of decisions about inputs, whatever a decision looks like.

The first line is a header that says what the rows are about, every other line is one input's row. What kind of rows
a file holds is a subclass: :class:`certifiers.verdict.Ledger` for verdicts against a threat set,
:class:`certifiers.smoothing.SmoothedLedger` for those of a smoothed classifier.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from certifiers import journal
from certifiers.errors import InputError, SoundnessError
from certifiers.journal import REMEDY

VERSION = 1

Row = TypeVar("Row")


class RowLedger(Generic[Row]):
    """A ledger of one kind of row; see the subclasses for what their rows and headers mean.

    Opening makes the file, or goes on with what is there after cutting off a last line that a kill left
    incomplete. No index ever stands there twice. A batch of rows is on the disk when :meth:`append` returns. Use
    it in a `with` block, or call :meth:`close`.

    Raises:
        InputError: the file is about something else (a key of :attr:`identity` differs), holds rows of another
            kind or ones that cannot be true (:meth:`flaws`), is damaged, is no ledger, or is being written by another
            process. It is left unchanged.
        SoundnessError: a certifier was contradicted when this ledger was written.
    """

    row: ClassVar[type]  # a frozen dataclass with a field `index`
    kind: ClassVar[str | None]  # the header's "kind"; None for the first kind there was, whose headers have none
    identity: ClassVar[tuple[str, ...]]  # what makes two ledgers the same experiment; other header keys are notes
    repeated: ClassVar[tuple[str, ...]] = ()  # header keys that every row repeats

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        first = {"ledger": VERSION} if self.kind is None else {"ledger": VERSION, "kind": self.kind}
        wanted = json.loads(json.dumps({**first, **header}))  # as it will be read back
        if not self.path.exists():
            journal.create(self.path, wanted)
        self._journal = journal.Appender(self.path)
        try:
            rows, end = journal.read(self.path)
            self.header, self._rows = self._parse(self.path, rows)
            self._check_same(wanted)
            self._journal.cut(end)
        except BaseException:
            self._journal.close()
            raise
        self._decided = {row.index for row in self._rows}

    @classmethod
    def read(cls, path: str | Path) -> tuple[dict[str, Any], list[Row]]:
        """The header and rows of a file, without changing it; an incomplete last line is left out."""
        path = Path(path)
        return cls._parse(path, journal.read(path)[0])

    @classmethod
    def typed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A row's values with the types of its fields, from those of JSON; ValueError or TypeError if impossible."""
        raise NotImplementedError

    @classmethod
    def flaws(cls, header: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
        """The places in ``rows`` of those that do not belong under this header, and why; none in what append takes.

        What a header does not say is not looked at.
        """
        for place, row in enumerate(rows):
            for key in cls.repeated:
                here, wanted = getattr(row, key), header.get(key)
                if key in header and here != wanted:
                    yield place, f"the ledger is for {key} {wanted}, but the row for {here}; each has its own ledger"

    @property
    def verdicts(self) -> list[Row]:
        """All rows, in the order they were written."""
        return list(self._rows)

    @property
    def decided(self) -> set[int]:
        """The indices that have a row, of whatever status; they need not be asked again."""
        return set(self._decided)

    def append(self, verdicts: Sequence[Row]) -> None:
        """Write these rows and sync them to the disk; all of them or, on an error, none.

        Raises InputError for an index that has a row already, and for a row that has :meth:`flaws`.
        """
        self._check(verdicts)
        new: set[int] = set()
        for verdict in verdicts:
            if verdict.index in self._decided or verdict.index in new:
                raise InputError(
                    f"Input {verdict.index} has a verdict already in the ledger {self.path}; skip the inputs "
                    "in Ledger.decided. Nothing was written."
                )
            new.add(verdict.index)
        self._journal.append(asdict(verdict) for verdict in verdicts)
        self._rows.extend(verdicts)
        self._decided |= new

    def record_contradiction(self, details: Mapping[str, Any]) -> None:
        """Write down that a certifier was contradicted; from then on the ledger cannot be opened any more."""
        self._journal.append([{"contradiction": dict(details)}])

    def close(self) -> None:
        """Release the file to other processes."""
        self._journal.close()

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, verdicts: Sequence[Row]) -> None:
        for place, why in self.flaws(self.header, verdicts):
            raise InputError(
                f"The row for input {verdicts[place].index} cannot go to the ledger {self.path}: {why}. Nothing was "
                "written."
            )

    @classmethod
    def _parse(cls, path: Path, lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Row]]:
        header = lines[0]
        if header.get("ledger") != VERSION:
            raise InputError(
                f'{path} is no ledger of verdicts: its first line should hold "ledger": {VERSION}. Nothing was '
                "changed; give the path of a ledger, or of a file that does not exist yet."
            )
        if header.get("kind") != cls.kind:
            raise InputError(
                f"The ledger {path} holds {_kind(header.get('kind'))}, but {_kind(cls.kind)} were asked for. Nothing "
                "was changed; give the path of such a ledger, or of a file that does not exist yet."
            )
        rows: list[Row] = []
        seen: set[int] = set()
        for number, line in enumerate(lines[1:], start=2):
            if "contradiction" in line:
                _tainted(path, line["contradiction"])
            try:
                row = cls.row(**cls.typed({name: line[name] for name in _names(cls.row, line)}))
            except (KeyError, ValueError, TypeError) as error:
                raise InputError(
                    f"Line {number} of the ledger {path} is no verdict ({type(error).__name__}: {error}). {REMEDY}"
                ) from error
            if row.index in seen:
                raise InputError(
                    f"Line {number} of the ledger {path} gives input {row.index} a second verdict. {REMEDY}"
                )
            seen.add(row.index)
            rows.append(row)
        for place, why in cls.flaws(header, rows):
            raise InputError(f"Line {place + 2} of the ledger {path} cannot be true: {why}. {REMEDY}")
        return header, rows

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        for key in ("ledger", *self.identity):
            if self.header.get(key) != wanted.get(key):
                raise InputError(
                    f"The ledger {self.path} holds verdicts for another {key}: {self.header.get(key)!r} there, "
                    f"{wanted.get(key)!r} now. Give another path, or move that file away to start anew; nothing "
                    "was changed."
                )


def _names(row: type, line: Mapping[str, Any]) -> list[str]:
    """The fields a line must hold, and those it may lack (they have a default: ledgers of old) and does not."""
    optional = (field for field in fields(row) if field.name in line)
    return [field.name for field in fields(row) if not _has_default(field)] + [
        field.name for field in optional if _has_default(field)
    ]


def _has_default(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def ledger_kind(path: str | Path) -> str | None:
    """The kind of rows that a ledger holds, from its header; InputError if it cannot be read."""
    return journal.read(Path(path))[0][0].get("kind")


def _kind(kind: str | None) -> str:
    return "verdicts against a threat set" if kind is None else f"verdicts of the kind {kind}"


def _tainted(path: Path, details: Mapping[str, Any]) -> NoReturn:
    raise SoundnessError(
        f"The ledger {path} records that an input contradicted a certifier ({details}), so none "
        "of its certificates can be trusted. Mend the certifier, move the file away and certify again."
    )
