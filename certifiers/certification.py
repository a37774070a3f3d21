"""Decide for each input whether its prediction can be proven, and keep what was decided: the entry to cascade.py."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from certifiers.cascade import Cascade
from certifiers.checks import check_model, count_classes, device_of
from certifiers.errors import InputError
from certifiers.methods import CASCADE, METHODS, method_names
from certifiers.resuming import check_predictions, decide_in_batches, decided_before, input_numbers
from certifiers.threat import Threat, check_images, check_labels
from certifiers.verdict import Ledger, Verdict

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
    input_seconds: float | None = None,
    run_seconds: float | None = None,
) -> list[Verdict]:
    """One verdict per input, in the order of `x`; without those that come after the end of `run_seconds`.

    An input is *certified* only if its prediction is right and, for every other class, one method's lower
    bound of logit[label] - logit[class] over the whole threat set is finite and above 0: ties never certify. The
    bounds hold in exact arithmetic, whatever rounding did to their computation (certifiers.bounds.rounding), save
    those of symbolic and of the lirpa methods, where it is not accounted for.
    The same inputs get the same attacks however they are batched.

    Args:
        model: (batch, ...) -> logits (batch, classes), in eval mode, without parametrizations; it is not
            changed. x: (n, ...) floats in [0, 1]. y: (n,) class numbers.
        method: a name in :data:`METHODS`, several of them in the order to be tried, or "cascade"
            (:data:`CASCADE`; with `input_seconds`, "exact" after it).
        attack_steps, attack_restarts: of :func:`certifiers.attack.attack`; with 0 steps only a random start is tried
            and bounds are held against the clean input only.
        indices: the inputs' numbers in their data set; 0 to n - 1 if None.
        ledger: verdicts it holds already are taken from it, new ones are written to it batch by batch. Its header must
            not name another norm, eps, method, attack_steps, attack_restarts or input_seconds.
        on_batch: called as (decided, n) after each batch.
        input_seconds: time for each input; one that is undecided by then gets no further method, and the status
            timeout. Methods that optimise or search heed it, the others run to their end.
        run_seconds: time for this call. Inputs up to the first one that is undecided by then have a verdict, and a
            line in the ledger. Those behind it have none, even where they are decided: which ones are depends on how
            hard they are. The same call later goes on with them.

    Raises:
        InputError: inputs, labels, model, method or ledger that do not fit; the message says what to do.
        SoundnessError: a certifier claimed more than a concrete input allows. The ledger gets a line of it.
    """
    methods = method_names(method, limited=input_seconds is not None)
    numbers = input_numbers(indices, len(x))
    check_model(model)
    check_images(x)
    if batch_size < 1:
        raise InputError(f"The batch size must be 1 or more, not {batch_size}.")
    _check_limits(input_seconds=input_seconds, run_seconds=run_seconds)
    if len(x) == 0:
        return []
    check_labels(y, len(x), count_classes(model, x))
    settings = {
        "norm": threat.norm,
        "eps": float(threat.eps),
        "method": "+".join(methods),
        "attack_steps": attack_steps,
        "attack_restarts": attack_restarts,
        "input_seconds": input_seconds,
    }
    labels = dict(zip(numbers, y.tolist(), strict=True))
    known = decided_before(ledger, model, settings, labels, claim=("norm", "eps"))
    check_predictions(ledger, model, x, numbers)
    device = device_of(model)
    deadline = None if run_seconds is None else time.monotonic() + run_seconds
    cascade = Cascade(model, threat, methods, attack_steps, attack_restarts, seed, input_seconds, deadline)

    def decide(rows: list[int]) -> list[Verdict | None]:
        return cascade.decide(x[rows].to(device), y[rows].long().to(device), [numbers[row] for row in rows])

    steps = {"late": lambda: cascade.late, "ledger": ledger, "on_batch": on_batch}
    return decide_in_batches(decide, numbers, known, batch_size, **steps)


def _check_limits(**limits: float | None) -> None:
    for name, seconds in limits.items():
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise InputError(f"{name} must be a number of seconds above 0, or None for no limit, not {seconds}.")
