"""Shards of one certification, made apart from each other (on several machines, say), put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from certifiers import journal
from certifiers.errors import InputError, SoundnessError
from certifiers.ledger import RowLedger, ledger_kind
from certifiers.radius import RadiusLedger
from certifiers.smoothing import SmoothedLedger
from certifiers.verdict import Ledger, Status

KINDS: dict[str | None, type[RowLedger]] = {kind.kind: kind for kind in (Ledger, RadiusLedger, SmoothedLedger)}
TIMES = {"seconds": 0.0, "stages": {}, "margin": None}  # what differs from run to run and machine to machine
WRONG = {Status.falsified, Status.misclassified}


def merge_ledgers(paths: Sequence[str | Path], out: str | Path) -> list[Any]:
    """Write the rows of all ``paths`` to the new ledger ``out``, by their index, and return them.

    The shards must be of one certification: the same kind, network, images, threat set and settings (all that the
    kind's ``identity`` names). Its other notes are those of the first. An index that several shards hold must have the
    same row in them, but for times and the last digits of a margin; the first shard's is kept. ``out`` appears wholly
    or not at all.

    Raises:
        InputError: no or unlike ledgers, an index with different rows, a path ``out`` that exists.
        SoundnessError: one shard certified what another one broke, or a shard has a contradiction on record.
    """
    paths, out = list(dict.fromkeys(map(Path, paths))), Path(out)
    if len(paths) < 2:
        raise InputError("Merging takes at least two different ledgers. Give the shards of one certification.")
    if out.exists():
        raise InputError(f"{out} exists already. Give a new path, and move the merged ledger where it belongs then.")
    kind = KINDS.get(ledger_kind(paths[0]))
    if kind is None:
        raise InputError(f"The ledger {paths[0]} holds verdicts of a kind that is not known here.")
    header, rows, source = None, {}, {}
    told: dict[Path, dict[str, Any]] = {}  # headers that say which images there are; those of old do not
    for path in paths:
        found, here = kind.read(path)
        header = found if header is None else header
        _check_same(kind, header, paths[0], found, path)
        for earlier, said in told.items():
            _check_same(kind, said, earlier, found, path)
        if "images" in found:
            told[path] = found
        for row in here:
            if row.index in rows:
                _check_agree(kind, rows[row.index], source[row.index], row, path)
                continue
            rows[row.index], source[row.index] = row, path
    if len(told) < len(paths):
        header.pop("images", None)  # not known of all rows
    merged = [rows[index] for index in sorted(rows)]
    journal.create(out, header, *map(asdict, merged))
    return merged


def _check_same(kind: type[RowLedger], first: dict[str, Any], where: Path, other: dict[str, Any], path: Path) -> None:
    for key in kind.identity:
        if key == "images" and None in (first.get(key), other.get(key)):
            continue  # a header of old does not say
        if first.get(key) != other.get(key):
            raise InputError(
                f"The ledgers {where} and {path} are of different certifications: their {key} is {first.get(key)!r} "
                f"and {other.get(key)!r}. Only shards of one can be merged; nothing was written."
            )


def _check_agree(kind: type[RowLedger], one: Any, where: Path, other: Any, path: Path) -> None:
    if _lasting(one) == _lasting(other):
        return
    text = f"Input {one.index} is {one.status.value} in {where}, but {other.status.value} in {path}"
    claims = {one.status, other.status}
    if kind is not SmoothedLedger and Status.certified in claims and claims & WRONG:
        raise SoundnessError(f"{text}: one of the two is wrong. Nothing was written; please report this.")
    raise InputError(
        f"{text}, or other figures stand beside it. Shards of one certification agree where they overlap; leave one "
        "out. Nothing was written."
    )


def _lasting(row: Any) -> Any:
    return replace(row, **{key: value for key, value in TIMES.items() if hasattr(row, key)})
