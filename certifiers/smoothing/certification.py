"""Certify inputs of a data set by smoothing, into a ledger that can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from certifiers.checks import check_model
from certifiers.errors import InputError
from certifiers.resuming import decided_before, input_numbers
from certifiers.smoothing.classifier import Certificate, SmoothedClassifier
from certifiers.smoothing.stopping import Stopping
from certifiers.smoothing.verdict import SmoothedLedger, SmoothedVerdict
from certifiers.threat import check_images, check_labels
from certifiers.verdict import Status

GROUP = 32  # inputs that share their noise are certified together, so many at a time


def certify_smoothed(
    classifier: SmoothedClassifier,
    x: Tensor,
    y: Tensor,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    stopping: Stopping | None = None,
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
        ledger: verdicts it holds already are taken from it, new ones are written to it one by one, or a group at a time
            where inputs share their noise. Its header should hold :func:`smoothing_header`.
        on_input: called as (decided, len(x)) after each input, or each group of inputs that share their noise.

    Raises InputError for inputs, labels, settings, a model or a ledger that do not fit.
    """
    numbers = input_numbers(indices, len(x))
    check_model(classifier.model)
    check_images(x)
    check_labels(y, len(x), classifier.num_classes)
    settings = {
        "sigma": classifier.sigma,
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "seed": seed,
        **smoothing_header(classifier, stopping, x),
    }
    labels = dict(zip(numbers, y.tolist(), strict=True))
    known = decided_before(ledger, classifier.model, settings, labels, claim=("sigma", "alpha"))
    _check_kind(ledger, settings)
    pending = [row for row, number in enumerate(numbers) if number not in known]
    if pending and batch_size is None:
        batch_size = classifier.batch_size(x[pending], n)
    size = GROUP if classifier.shared_noise else 1
    for first in range(0, len(pending), size):
        rows = pending[first : first + size]
        begin = time.perf_counter()
        found = classifier.certify(
            x[rows],
            n0,
            n,
            alpha,
            stopping=stopping,
            seed=seed,
            indices=[numbers[row] for row in rows],
            batch_size=batch_size,
        )
        seconds = (time.perf_counter() - begin) / sum(n0 + certificate.samples for certificate in found)
        verdicts = [
            _verdict(numbers[row], int(y[row]), certificate, seconds * (n0 + certificate.samples))
            for row, certificate in zip(rows, found, strict=True)
        ]
        if ledger is not None:
            ledger.append(verdicts)
        for verdict in verdicts:
            known[verdict.index] = verdict
        if on_input is not None:
            on_input(len(numbers) - len(pending) + first + len(rows), len(numbers))
    return [known[number] for number in numbers]


def smoothing_header(classifier: SmoothedClassifier, stopping: Stopping | None, x: Tensor) -> dict[str, Any]:
    """The part of a ledger's header that says how inputs such as x (inputs, ...) are smoothed.

    That is "norm", "slack" (:meth:`SmoothedClassifier.slack`), and what is not as in Cohen et al. Ledgers without
    "noise", "shared_noise" and "stopping" are of Gaussian noise, of each input's own, and a fixed n.
    """
    header: dict[str, Any] = {"norm": classifier.kind.norm, "slack": classifier.slack(x)}
    if classifier.noise != "gaussian":
        header["noise"] = classifier.noise
    if classifier.shared_noise:
        header["shared_noise"] = True
    if stopping is not None:
        header["stopping"] = stopping.header()
    return header


def _check_kind(ledger: SmoothedLedger | None, settings: Mapping[str, Any]) -> None:
    """What a header leaves out has a meaning too: InputError if it is not what is asked for."""
    for key in ("noise", "shared_noise", "stopping", "slack"):
        if ledger is not None and ledger.header.get(key) != settings.get(key):
            raise InputError(
                f"The ledger {ledger.path} is for {key} {ledger.header.get(key)}, but {settings.get(key)} is to be "
                "certified. Give each its own ledger; nothing was written."
            )


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
        samples=found.samples,
    )
