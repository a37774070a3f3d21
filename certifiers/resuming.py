"""Going on with a ledger: which inputs it has decided already, and whether it is about the same thing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from certifiers.cascade import Contradiction
from certifiers.checks import device_of
from certifiers.errors import InputError
from certifiers.fingerprint import model_hash
from certifiers.ledger import RowLedger
from certifiers.methods import METHODS, method_names

Row = TypeVar("Row")

_PREDICTED = 64  # known inputs that are run again


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
    ledger: RowLedger[Row] | None,
    model: nn.Module,
    settings: Mapping[str, Any],
    labels: Mapping[int, int],
    claim: Sequence[str],
) -> dict[int, Row]:
    """The rows that the ledger holds, by index.

    `claim`: those of `settings` that say what a row claims, which it or the header must tell.

    Raises InputError if the header is about another model or has another value for one of `settings`, if a row claims
    something else, or nobody says what, or if it has another label than the input of that number in `labels`.
    """
    if ledger is None:
        return {}
    now = {"model": model_hash(model) if "model" in ledger.header else None, **settings}
    for key, value in now.items():
        if key in ledger.header and not _same(key, ledger.header[key], value):
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
    for key in claim:
        for number in known.keys() & labels.keys():
            told = getattr(known[number], key, ledger.header.get(key))
            if told is None or not _same(key, told, settings[key]):
                found = f"does not say for which {key}" if told is None else f"is for {key} {told}"
                raise InputError(
                    f"The ledger {ledger.path} has a row for input {number} that {found}, but {key} "
                    f"{settings[key]} is to be certified. Give another ledger; nothing was written."
                )
    return known


@torch.no_grad()
def check_predictions(ledger: RowLedger[Row] | None, model: nn.Module, x: Tensor, numbers: Sequence[int]) -> None:
    """Raise InputError unless the model predicts for inputs that the ledger knows what is written of them there.

    Where code of a forward pass or the images have changed, no hash of weights and no label tells. Up to 64 inputs;
    another prediction counts where its logit is larger by more than rounding.
    """
    held = {row.index: row.prediction for row in ledger.verdicts} if ledger is not None else {}
    places = [place for place, number in enumerate(numbers) if number in held][:_PREDICTED]
    if not places:
        return
    logits = model(x[places].to(device_of(model)))
    written = torch.tensor([held[numbers[place]] for place in places], device=logits.device)
    if int(written.max()) < logits.shape[1]:
        most = logits.amax(1)
        behind = most - logits.gather(1, written.unsqueeze(1)).squeeze(1)
        if not (behind > 1e-3 * logits.abs().amax(1)).any():
            return
    raise InputError(
        f"The ledger {ledger.path} has other predictions for some of these inputs than the model gives now: code of "
        "its forward pass has changed, or the images have. Give another ledger; nothing was written."
    )


def _same(key: str, written: Any, value: Any) -> bool:
    """Whether a header's value is what is asked for; methods may be written as a list, and the usual ones by a word."""
    if key != "method" or written == value:
        return written == value
    names = written.split("+") if isinstance(written, str) else list(written)
    if not set(names) <= {"cascade", *METHODS}:
        return False
    return any("+".join(method_names(names, limited)) == value for limited in (False, True))


def decide_in_batches(
    decide: Callable[[list[int]], Sequence[Row | None]],
    numbers: Sequence[int],
    known: dict[int, Row],
    size: int,
    *,
    late: Callable[[], bool],
    ledger: RowLedger[Row] | None,
    on_batch: Callable[[int, int], None] | None,
) -> list[Row]:
    """The rows of the inputs ``numbers``, in their order: those ``known``, and new ones, which go to the ledger.

    ``decide`` is asked about the places in ``numbers`` of inputs that are not known, ``size`` at a time until it is
    ``late``; it has None for what it did not get to. Of such a batch, only the inputs before the first None have a row:
    of those behind it the easy ones alone are decided, and rows of these would make the accuracies of what is there
    those of a sample that was chosen by its outcome. ``on_batch``: called as (decided, of how many) after each batch.
    A Contradiction is written to the ledger and raised on.
    """
    pending = [place for place, number in enumerate(numbers) if number not in known]
    done = len(numbers) - len(pending)
    for first in range(0, len(pending), size):
        if late():
            break
        try:
            found = decide(pending[first : first + size])
        except Contradiction as contradiction:
            if ledger is not None:
                ledger.record_contradiction(contradiction.details)
            raise
        rows = list(itertools.takewhile(lambda row: row is not None, found))
        if ledger is not None:
            ledger.append(rows)
        known.update({row.index: row for row in rows})
        done += len(rows)
        if on_batch is not None:
            on_batch(done, len(numbers))
    return [known[number] for number in numbers if number in known]
