"""What every way of certifying a run shares: the images that are asked about, and how far a ledger has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from certifiers.errors import InputError
from certifiers.ledger import RowLedger
from certprune.progress import Progress
from certprune.runs import Run


@dataclass(frozen=True)
class Asked:
    """Images ``x`` (images, ...) of a run's split with their labels ``y`` and their ``numbers`` there."""

    x: Tensor
    y: Tensor
    numbers: range


def asked_images(run: Run, data: Any, indices: range | None, count: int | None) -> Asked:
    """Images of the split that the run's recipe certifies: ``indices``, else the first ``count``, else all.

    Raises InputError if they are not all there.
    """
    name = run.recipe.certify.split
    split = getattr(data, name)
    numbers = checked_indices(indices, count, len(split.y), f"{data.name} {name}")
    return Asked(split.x[numbers.start : numbers.stop], split.y[numbers.start : numbers.stop], numbers)


def checked_indices(indices: range | None, count: int | None, available: int, where: str) -> range:
    """The images to certify: ``indices``, else the first ``count``; InputError if they are not all there."""
    if indices is None:
        return range(min(count or available, available))
    if not 0 <= indices.start < indices.stop <= available:
        raise InputError(
            f"The images to certify must be a part of 0:{available} (the {where} images), but "
            f"{indices.start}:{indices.stop} came."
        )
    return indices


def shortfall(decided: Iterable[int], numbers: range) -> str:
    """What to say where a ledger with rows of ``decided`` lacks images of ``numbers``; "" where it has them all."""
    held = len(set(numbers).intersection(decided))
    if held == len(numbers):
        return ""
    return f"{held} of the {len(numbers)} images asked for are in it, and nothing is known of the rest"


def begun(
    progress: Progress, title: str, ledger: RowLedger[Any], numbers: Sequence[int]
) -> Callable[[int, int], None] | None:
    """Show the work on ``numbers`` that ``ledger`` leaves; None if it has decided all of them already.

    What is returned takes how many are decided by now (and of how many), whenever there are more.
    """
    decided = len(ledger.decided.intersection(numbers))
    if decided == len(numbers):
        return None
    progress.begin(title, len(numbers), done=decided)
    before = [decided]

    def note(now: int, _: int) -> None:
        progress.advance(now - before[-1])
        before.append(now)

    return note
