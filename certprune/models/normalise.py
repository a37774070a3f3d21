"""Normalisation as the first layer of a model, so that every input stays in pixel units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from certifiers.errors import InputError


class Normalise(nn.Module):
    """`(x - mean) / std` per channel; x is (batch, channels, height, width) with pixels in [0, 1].

    `mean` and `std` are buffers of shape (channels, 1, 1): saved with the weights, moved with the model,
    never trained and never pruned.

    Raises InputError if the lengths differ, a number is not finite, or a std is not positive.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float], channels: int | None = None):
        super().__init__()
        mean, std = _numbers("mean", mean, channels), _numbers("std", std, channels)
        if len(mean) != len(std):
            raise InputError(f"mean and std need one number per channel each, but {mean} and {std} came.")
        if min(std) <= 0:
            raise InputError(f"std must be positive in every channel, but {std} came.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def _numbers(name: str, value: float | Sequence[float], channels: int | None) -> list[float]:
    """`value` as one finite float per channel; a single number serves every channel."""
    values = [value] * (channels or 1) if isinstance(value, (int, float)) else list(value)
    if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise InputError(f"{name} must be a number per channel, finite, but {value!r} came.")
    if channels is not None and len(values) != channels:
        raise InputError(f"{name} must have {channels} numbers, one per channel, but {values} came.")
    return [float(v) for v in values]
