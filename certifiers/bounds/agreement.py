"""Whether two computations of one network's outputs are the same up to rounding, however small the outputs are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Values on the way are moved by so many units of roundoff; outputs may differ by so many times what comes of it.
ROUNDOFFS, TIMES = 16, 8


def agree(expected: Tensor, got: Tensor, tolerance: float, moved: Callable[[], Tensor]) -> bool:
    """Whether ``got`` is ``expected``, both (batch, outputs), up to ``tolerance`` and what rounding explains.

    The tolerance is relative to how far apart the outputs of one input lie (an offset that all share says nothing
    about margins). Outputs that cancel may be off by more: by a multiple of how far ``moved()``, the outputs of the
    same network with all values along the way :func:`shaken`, are from ``got``. Larger differences than 10 times the
    tolerance of an output's own size plus the tolerance of the largest output's (1 at least) are never explained.
    Where both are infinite or not numbers they agree.
    """
    if expected.shape != got.shape:
        return False
    finite = expected.isfinite() & got.isfinite()
    if not (finite | ~(expected.isfinite() | got.isfinite())).all():
        return False
    expected, got = expected.where(finite, 0.0), got.where(finite, 0.0)
    error = (got - expected).abs()
    most = tolerance * (10 * expected.abs() + expected.abs().amax().clamp(min=1))
    if (error > most).any():
        return False
    spread = expected.amax(1, keepdim=True) - expected.amin(1, keepdim=True)
    if (error <= tolerance * spread).all():
        return True
    rounding = (moved().where(finite, 0.0) - got).abs().amax(1, keepdim=True)
    return bool((error <= tolerance * spread + TIMES * rounding).all())


def shaken(value: Tensor) -> Tensor:
    """``value`` (batch, *shape), each entry moved at random by a few units of roundoff; always the same way."""
    generator = torch.Generator().manual_seed(value.numel())
    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(value.device)
    return value + value * (2 * signs - 1).to(value) * (ROUNDOFFS * torch.finfo(value.dtype).eps / 2)
