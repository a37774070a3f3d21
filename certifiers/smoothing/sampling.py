"""How often each class wins under noise: the only part of smoothing that runs the network.

Nearly all time goes to forward passes. What surrounds them is kept small: one buffer is filled with noise in place
and the input is added in place, the counts stay on the device until the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.smoothing.noise import BLOCK

Fill = Callable[[Tensor], None]  # overwrites whole blocks (k * BLOCK, ...) with the next noise of one input


def class_counts(
    model: nn.Module, x: Tensor, fill: Fill, n: int, num_classes: int, batch_size: int | None = None
) -> Tensor:
    """(num_classes,) int64 on the CPU: how many of `n` noisy copies of the input each class wins.

    A sample whose largest logit is shared by several classes is won by none: the base classifier is the network that
    answers "tie" there, so that a certificate never hangs on the order of classes. `x` is one input (...) in pixel
    units on the model's device, on the grid of the noise, so that the sum is exact (:mod:`noise`); it is never clipped,
    since the theorem is about unclipped noise.

    ``batch_size``: at most so many samples in a forward pass (default: :func:`suggested_batch`). The noise does not
    depend on it. The forward pass may round differently in another batch, so a sample whose two largest logits are
    equal up to rounding may be counted otherwise; in practice that is one of many millions.

    Raises InputError if a logit is not finite.
    """
    batch_size = batch_size or suggested_batch(x)
    rows = min(max(batch_size // BLOCK, 1), -(-n // BLOCK)) * BLOCK
    with torch.inference_mode():
        buffer = x.new_empty((rows, *x.shape))
        counts = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        for first in range(0, n, rows):
            wanted = min(rows, n - first)
            used = buffer[: -(-wanted // BLOCK) * BLOCK]
            fill(used)
            for batch in used[:wanted].add_(x).split(batch_size):
                logits = model(batch)
                finite &= logits.isfinite().all()
                counts += sole_winners(logits)
        check_finite(bool(finite))
        return counts.cpu()


def check_finite(finite: bool) -> None:
    """Raise InputError if not all logits of noisy inputs were finite."""
    if not finite:
        raise InputError(
            "The model's output for a noisy input is NaN or infinite, though its weights are finite: they are so "
            "large that sums overflow. Train it anew with a lower learning rate or gradient clipping, or take an "
            "earlier checkpoint."
        )


def sole_winners(logits: Tensor) -> Tensor:
    """(classes,) int64: in how many rows of `logits` (batch, classes) each class alone has the largest."""
    largest = logits == logits.amax(1, keepdim=True)
    return (largest & (largest.sum(1, keepdim=True) == 1)).sum(0)


def suggested_batch(x: Tensor) -> int:
    """Samples in a forward pass: what stays in a CPU's cache, or on a GPU about 64 MiB of float32 inputs.

    On one thread of a CPU, cnn_small takes 13.8 microseconds a sample of 28x28 in batches of 100 (15.6 in batches of
    50, 14.4 in batches of 1,000), cnn_large 220 (320 in batches of 200); drawing the noise takes 2.1.
    """
    if x.device.type == "cpu":
        return BLOCK
    return BLOCK * min(max(2**24 // (x.numel() * BLOCK), 1), 100)


def fastest_batch(model: Callable[[Tensor], Tensor], x: Tensor, most: int, seconds: float = 0.5) -> int:
    """The samples in a forward pass, of those tried, that take the least time each: one to two passes of each size.

    Begins at one block and doubles until a larger batch is clearly slower,
    does not fit in memory, exceeds `most`, or all took `seconds`. `x` is one input (...) on the model's device.
    """
    size = best = BLOCK
    fastest, begin = float("inf"), time.perf_counter()
    with torch.inference_mode():
        while size <= max(most, BLOCK) and time.perf_counter() - begin < seconds:
            try:
                batch = x.expand(size, *x.shape).contiguous()
                took = min(_time(model, batch) for _ in range(2)) / size
            except torch.OutOfMemoryError:
                break
            if took < 0.97 * fastest:  # a larger batch must be worth it
                best, fastest = size, took
            elif took > 1.5 * fastest:
                break
            size *= 2
    return best


def _time(model: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    begin = time.perf_counter()
    sole_winners(model(batch)).sum().item()  # the number waits for a GPU to be done
    return time.perf_counter() - begin
