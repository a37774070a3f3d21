"""Going on with a ledger: which inputs it has decided already, and whether it is about the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from certifiers.errors import InputError
from certifiers.fingerprint import model_hash
from certifiers.ledger import RowLedger

Row = TypeVar("Row")


def input_numbers(indices: Sequence[int] | None, n: int) -> list[int]:
    """The inputs' numbers in their data set, 0 to n - 1 if none are given; InputError unless n different ones."""
    numbers = list(range(n)) if indices is None else [int(index) for index in indices]
    if len(numbers) != n or len(set(numbers)) != n:
        raise InputError(
            f"The indices must be {n} different numbers, one for each input, but {len(numbers)} came, "
            f"{len(set(numbers))} of them different."
        )
    return numbers


def decided_before(
    ledger: RowLedger[Row] | None, model: nn.Module, settings: Mapping[str, Any], labels: Mapping[int, int]
) -> dict[int, Row]:
    """The rows that the ledger holds, by index.

    Raises InputError if its header is about another model or has another value for one of `settings`, or if a row has
    another label than the input of that number in `labels`.
    """
    if ledger is None:
        return {}
    now = {"model": model_hash(model) if "model" in ledger.header else None, **settings}
    for key, value in now.items():
        if key in ledger.header and ledger.header[key] != value:
            raise InputError(
                f"The ledger {ledger.path} is for {key} {ledger.header[key]}, but {value} is to be "
                "certified. Give each model and threat set its own ledger; nothing was written."
            )
    known = {verdict.index: verdict for verdict in ledger.verdicts}
    for number, label in labels.items():
        if number in known and known[number].label != label:
            raise InputError(
                f"The ledger {ledger.path} has label {known[number].label} for input {number}, but label "
                f"{label} came with it now: it is about other data. Give another ledger; nothing was written."
            )
    return known
