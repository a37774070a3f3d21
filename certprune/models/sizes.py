"""What every builder of networks asks: how wide, and whether images of that size get through."""

from __future__ import annotations

import math

from certifiers.errors import InputError


def scaled(base: int, width: float) -> int:
    """``base`` channels or units at that width, at least one."""
    return max(1, round(base * width))


def checked_width(name: str, width: float) -> None:
    """InputError unless ``width`` is a positive, finite factor; ``name`` is the model's."""
    number = isinstance(width, (int, float)) and not isinstance(width, bool)
    if not number or not math.isfinite(width) or width <= 0:
        raise InputError(f"{name}: width must be a positive factor such as 1 or 0.5, but {width!r} came.")


def shape_left(name: str, input_shape: tuple[int, int, int], halvings: int) -> tuple[int, int]:
    """(height, width) after that many layers of stride 2 that round down; InputError where nothing is left."""
    left = tuple(size >> halvings for size in input_shape[1:])
    if min(left) < 1:
        raise InputError(
            f"{name} cannot take images of shape {tuple(input_shape)} (channels, height, width): it halves them "
            f"{halvings} times. Use images of {2**halvings}x{2**halvings} at least, or the model 'mlp'."
        )
    return left
