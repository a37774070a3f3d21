"""Certify inputs of a data set by smoothing, into a ledger that can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from certifiers.checks import check_model
from certifiers.resuming import decided_before, input_numbers
from certifiers.smoothing.classifier import Certificate, SmoothedClassifier
from certifiers.smoothing.verdict import SmoothedLedger, SmoothedVerdict
from certifiers.threat import check_images, check_labels
from certifiers.verdict import Status


def certify_smoothed(
    classifier: SmoothedClassifier,
    x: Tensor,
    y: Tensor,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    ledger: SmoothedLedger | None = None,
    on_input: Callable[[int, int], None] | None = None,
) -> list[SmoothedVerdict]:
    """One verdict per input, in the order of `x`; see :meth:`SmoothedClassifier.certify` for what is guaranteed.

    Args:
        x: (inputs, ...) floats in [0, 1]. y: (inputs,) class numbers.
        indices: the inputs' numbers in their data set, which seed their noise; 0 to len(x) - 1 if None.
        ledger: verdicts it holds already are taken from it, new ones are written to it one by one.
        on_input: called as (decided, len(x)) after each input.

    Raises InputError for inputs, labels, settings, a model or a ledger that do not fit.
    """
    numbers = input_numbers(indices, len(x))
    check_model(classifier.model)
    check_images(x)
    check_labels(y, len(x), classifier.num_classes)
    settings = {"sigma": classifier.sigma, "n0": n0, "n": n, "alpha": alpha, "seed": seed, "norm": "l2"}
    labels = dict(zip(numbers, y.tolist(), strict=True))
    known = decided_before(ledger, classifier.model, settings, labels)
    pending = [row for row, number in enumerate(numbers) if number not in known]
    for place, row in enumerate(pending, start=1):
        begin = time.perf_counter()
        (found,) = classifier.certify(
            x[row : row + 1], n0, n, alpha, seed=seed, indices=[numbers[row]], batch_size=batch_size
        )
        verdict = _verdict(numbers[row], int(y[row]), found, time.perf_counter() - begin)
        if ledger is not None:
            ledger.append([verdict])
        known[verdict.index] = verdict
        if on_input is not None:
            on_input(len(numbers) - len(pending) + place, len(numbers))
    return [known[number] for number in numbers]


def _verdict(index: int, label: int, found: Certificate, seconds: float) -> SmoothedVerdict:
    if found.prediction is None:
        status = Status.abstained
    else:
        status = Status.certified if found.prediction == label else Status.misclassified
    return SmoothedVerdict(
        index=index,
        label=label,
        prediction=found.prediction,
        status=status,
        radius=found.radius,
        counts=found.counts,
        selection=found.selection,
        seconds=seconds,
    )
