"""Decide for each input whether its prediction can be proven, cheapest means first.

An input is predicted, then attacked, then bounded: by the first method all that are predicted right, by the
next only what is still open. No certifier is believed on its word. Every bound it claims, for every class, is
held against the margins that the real network shows at the clean input and at the attacked one, those of
falsified inputs included; a bound above them is a contradiction, which stops everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from certifiers.attack import attack
from certifiers.checks import check_logits, check_model, count_classes, device_of
from certifiers.errors import InputError, SoundnessError
from certifiers.methods import CASCADE, METHODS, method_names
from certifiers.resuming import decided_before, input_numbers
from certifiers.threat import Threat, check_images, check_labels
from certifiers.verdict import Ledger, Status, Verdict

__all__ = ["CASCADE", "METHODS", "certify", "check_model"]


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    method: str | Sequence[str] = "cascade",
    *,
    attack_steps: int = 40,
    attack_restarts: int = 2,
    batch_size: int = 200,
    indices: Sequence[int] | None = None,
    ledger: Ledger | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """One verdict per input, in the order of `x`.

    An input is *certified* only if its prediction is right and, for every other class, one method's lower
    bound of logit[label] - logit[class] over the whole threat set is finite and above 0: ties never certify.
    The same inputs get the same attacks however they are batched.

    Args:
        model: (batch, ...) -> logits (batch, classes), in eval mode, without parametrizations; it is not
            changed. x: (n, ...) floats in [0, 1]. y: (n,) class numbers.
        method: a name in :data:`METHODS`, several of them in the order to be tried, or "cascade"
            (:data:`CASCADE`).
        attack_steps, attack_restarts: of :func:`certifiers.attack.attack`; with 0 steps nothing is falsified
            and bounds are held against the clean input only.
        indices: the inputs' numbers in their data set; 0 to n - 1 if None.
        ledger: verdicts it holds already are taken from it, new ones are written to it batch by batch.
        on_batch: called as (decided, n) after each batch.

    Raises:
        InputError: inputs, labels, model, method or ledger that do not fit; the message says what to do.
        SoundnessError: a certifier claimed more than a concrete input allows. The ledger gets a line of it.
    """
    methods = method_names(method)
    numbers = input_numbers(indices, len(x))
    check_model(model)
    check_images(x)
    if batch_size < 1:
        raise InputError(f"The batch size must be 1 or more, not {batch_size}.")
    if len(x) == 0:
        return []
    check_labels(y, len(x), count_classes(model, x))
    eps = float(threat.eps)
    labels = dict(zip(numbers, y.tolist(), strict=True))
    known = decided_before(ledger, model, {"norm": threat.norm, "eps": eps}, labels)
    device = device_of(model)
    job = _Job(model, threat, eps, methods, attack_steps, attack_restarts, seed)
    pending = [row for row, number in enumerate(numbers) if number not in known]
    for first in range(0, len(pending), batch_size):
        rows = pending[first : first + batch_size]
        names = [numbers[row] for row in rows]
        try:
            verdicts = _decide(job, x[rows].to(device), y[rows].long().to(device), names)
        except _Contradiction as contradiction:
            if ledger is not None:
                ledger.record_contradiction(contradiction.details)
            raise
        if ledger is not None:
            ledger.append(verdicts)
        known.update({verdict.index: verdict for verdict in verdicts})
        if on_batch is not None:
            on_batch(len(numbers) - len(pending) + first + len(rows), len(numbers))
    return [known[number] for number in numbers]


@dataclass(frozen=True)
class _Job:
    """What is the same for all batches."""

    model: nn.Module
    threat: Threat
    eps: float
    methods: tuple[str, ...]
    attack_steps: int
    attack_restarts: int
    seed: int


class _Contradiction(SoundnessError):
    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


@dataclass
class _Outcome:
    """How an input stands so far; it starts as one that is predicted right and still open."""

    status: Status = Status.unknown
    method: str = ""
    margin: float | None = None


def _decide(job: _Job, x: Tensor, y: Tensor, numbers: Sequence[int]) -> list[Verdict]:
    """The verdicts of one batch."""
    begin = time.perf_counter()
    with torch.no_grad():
        logits = job.model(x)
    check_logits(logits, numbers)
    predictions = logits.argmax(1)
    right = predictions == y
    outcomes = [_Outcome() if good else _Outcome(Status.misclassified, "clean") for good in right.tolist()]
    rows = right.nonzero().flatten()
    if len(rows):
        names = [numbers[row] for row in rows.tolist()]
        _decide_right(job, x[rows], y[rows], logits[rows], names, [outcomes[row] for row in rows.tolist()])
    seconds = (time.perf_counter() - begin) / len(numbers)
    return [
        Verdict(
            index=number,
            label=label,
            prediction=prediction,
            status=outcome.status,
            eps=job.eps,
            norm=job.threat.norm,
            method=outcome.method,
            margin=outcome.margin,
            seconds=seconds,
        )
        for number, label, prediction, outcome in zip(numbers, y.tolist(), predictions.tolist(), outcomes, strict=True)
    ]


def _decide_right(
    job: _Job, x: Tensor, y: Tensor, logits: Tensor, numbers: Sequence[int], outcomes: Sequence[_Outcome]
) -> None:
    """Attack and bound inputs that are predicted right; what comes out is written into `outcomes`."""
    x_adv, broken = attack(
        job.model, x, y, job.threat, job.attack_steps, job.attack_restarts, seed=job.seed, indices=numbers
    )
    with torch.no_grad():
        shown = _Shown.of(y, logits, job.model(x_adv))
    for outcome, is_broken in zip(outcomes, broken.tolist(), strict=True):
        if is_broken:
            outcome.status, outcome.method = Status.falsified, "attack"
    rows = torch.arange(len(x), device=x.device)
    for name in job.methods:
        bounds = METHODS[name](job.model, x[rows], y[rows], job.threat)
        if bounds.shape != logits[rows].shape:
            raise InputError(
                f"The method {name} must give bounds of shape {tuple(logits[rows].shape)} (batch, classes), "
                f"but gave {tuple(bounds.shape)}; mend it where it is defined."
            )
        _check_not_contradicted(job, name, bounds, shown, rows, y, numbers)
        # Where rounding puts a bound above what was shown, the latter counts: a tie must not certify.
        proven = torch.minimum(bounds, shown.margins[rows]).where(bounds.isfinite(), math.nan)
        lowest = proven.scatter(1, y[rows, None], math.inf).amin(1)  # NaN where a class is
        for row, margin in zip(rows.tolist(), lowest.tolist(), strict=True):
            if outcomes[row].status is Status.unknown:
                _settle(outcomes[row], name, margin)
        rows = rows[[outcomes[row].status is Status.unknown for row in rows.tolist()]]
        if len(rows) == 0:
            return


def _settle(outcome: _Outcome, method: str, margin: float) -> None:
    """Take in what one more method proved about an open input."""
    outcome.method = method
    if not math.isfinite(margin):
        return
    outcome.margin = margin if outcome.margin is None else max(margin, outcome.margin)
    if margin > 0.0:
        outcome.status = Status.certified


class _Shown(NamedTuple):
    """What the network really does on concrete inputs of the threat set."""

    margins: Tensor  # (batch, classes), the smallest logit[label] - logit[j] seen
    rounding: Tensor  # (batch, 1), by how much rounding may lift a correct bound above that

    @staticmethod
    def of(y: Tensor, clean: Tensor, attacked: Tensor) -> _Shown:
        """From the logits of the clean and of the attacked inputs."""
        label = y[:, None]
        margins = torch.minimum(clean.gather(1, label) - clean, attacked.gather(1, label) - attacked)
        largest = torch.maximum(clean.abs(), attacked.abs()).amax(1, keepdim=True)
        # 1,000 units in the last place: 1.2e-4 relative in float32.
        return _Shown(margins, 1e3 * torch.finfo(clean.dtype).eps * (1.0 + largest))


def _check_not_contradicted(
    job: _Job, method: str, bounds: Tensor, shown: _Shown, rows: Tensor, y: Tensor, numbers: Sequence[int]
) -> None:
    """Raise where a bound (one line for each of `rows`) is above what the network showed there."""
    margins = shown.margins[rows]
    over = (bounds > margins + shown.rounding[rows]) & bounds.isfinite() & margins.isfinite()
    over = over.scatter(1, y[rows, None], False)
    if not over.any():
        return
    line, wrong = over.nonzero()[0].tolist()
    row = int(rows[line])
    details = {
        "index": numbers[row],
        "label": int(y[row]),
        "class": wrong,
        "method": method,
        "claimed": bounds[line, wrong].item(),
        "shown": margins[line, wrong].item(),
        "norm": job.threat.norm,
        "eps": job.eps,
        "attack_steps": job.attack_steps,
        "attack_restarts": job.attack_restarts,
        "seed": job.seed,
    }
    raise _Contradiction(
        f"The certifier {method} is unsound on this model: for input {numbers[row]} (label {int(y[row])}, "
        f"class {wrong}) it claims a margin of at least {details['claimed']:g} within {job.threat.norm} "
        f"{job.eps:g}, but an input that lies within has {details['shown']:g}. None of its certificates for "
        "this model can be trusted; please report this with the model.",
        details,
    )
