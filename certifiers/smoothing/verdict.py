"""What a smoothed classifier showed at each input of a data set, where that is kept, and what it sums up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifiers.errors import InputError
from certifiers.verdict import Accuracy, ImageLedger, Status

KIND = "smoothing"  # the "kind" in the header of such a ledger


@dataclass(frozen=True)
class SmoothedVerdict:
    """The outcome for one input of a data set.

    `status` is certified (the prediction is right, within `radius` > 0), misclassified (a wrong prediction, which
    holds within `radius`) or abstained (`prediction` None, `radius` 0). `radius` is in pixels, in the header's norm, as
    computed: round it down to print it. `counts` and `selection` are the raw counts of each class, of the `samples`
    drawn and of the n0. `samples` is the header's n, or less where sampling stopped early; None in old ledgers: n.
    """

    index: int
    label: int
    prediction: int | None
    status: Status
    radius: float
    counts: tuple[int, ...]
    selection: tuple[int, ...]
    seconds: float
    samples: int | None = None


class SmoothedLedger(ImageLedger[SmoothedVerdict]):
    """The append-only file of verdicts about one smoothed classifier on one data set.

    Header: "model" (:func:`~certifiers.fingerprint.model_hash`), "data", "split", "images", "norm" ("l2", "l1"),
    "sigma", "n0", "n", "alpha", "seed", "noise", "shared_noise" and "stopping" as far as they apply, "slack", which
    must be the same to go on, and any notes; "pixels", the size of an input, is needed to tell what radii imply in
    other norms. "slack" is what was taken off the radii because inputs and noise are snapped to a grid; ledgers from
    before that have none, and are read, but not gone on with: their noise was another.
    """

    row = SmoothedVerdict
    kind = KIND
    identity = (
        "model",
        "data",
        "split",
        "images",
        "norm",
        "sigma",
        "n0",
        "n",
        "alpha",
        "seed",
        "noise",
        "shared_noise",
        "stopping",
        "slack",
    )

    @classmethod
    def typed(cls, values: dict[str, Any]) -> dict[str, Any]:
        prediction = values["prediction"]
        return {
            **values,
            "index": int(values["index"]),
            "prediction": None if prediction is None else int(prediction),
            "status": Status(values["status"]),
            "radius": float(values["radius"]),
            "counts": tuple(map(int, values["counts"])),
            "selection": tuple(map(int, values["selection"])),
            "samples": None if values.get("samples") is None else int(values["samples"]),
        }

    @classmethod
    def flaws(cls, header: Mapping[str, Any], rows: Sequence[SmoothedVerdict]) -> Iterator[tuple[int, str]]:
        from certifiers.smoothing.evidence import flawed

        yield from super().flaws(header, rows)
        yield from flawed(header, rows)


def read_smoothed_ledger(path: str | Path) -> tuple[dict[str, Any], list[SmoothedVerdict]]:
    """The header and verdicts of a ledger, without changing it; an incomplete last line is left out.

    Raises InputError for a file that is missing, damaged (naming the line), no ledger or one of another kind.
    """
    return SmoothedLedger.read(path)


def certified_accuracy(verdicts: Sequence[SmoothedVerdict], radius: float) -> Accuracy:
    """How many inputs are predicted right with a certified radius of at least `radius` (as Cohen et al. count).

    At radius 0 it is the accuracy of the smoothed classifier, abstentions counted as wrong. Raises InputError for no
    verdicts and for a radius that is negative or no number.
    """
    if not verdicts:
        raise InputError("Accuracies need at least one verdict, but none came. Certify some inputs first.")
    if math.isnan(radius) or radius < 0:
        raise InputError(f"A radius must be a number of at least 0, but {radius} came.")
    held = sum(verdict.status is Status.certified and verdict.radius >= radius for verdict in verdicts)
    return Accuracy(held, len(verdicts))
