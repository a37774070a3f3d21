"""Threat sets: which inputs an adversary may show instead of a clean one.

A threat set is a ball around the clean input *cut to the valid pixel range [0, 1]*: never to the range of the
images at hand, which would certify against a weaker adversary. Inputs are in pixel units, with normalisation
as the model's first layer, so that eps means the same for every model.

All radii hold up to the rounding of the input's own dtype (x + eps is rounded to nearest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from certifiers.errors import InputError

PIXEL_UNITS = (
    "Inputs must be in pixel units, that is in [0, 1]; put normalisation (mean, standard deviation) into the "
    "model as its first layer."
)


def _check_eps(eps: float | Tensor) -> None:
    if isinstance(eps, Tensor):  # from a schedule, maybe under torch.compile: its value is not looked at
        if eps.dim() != 0 and (eps.dim() < 2 or eps[0].numel() != 1):
            raise InputError(
                f"eps must be one number, or one for each input as (batch, 1, ..., 1); a tensor of shape "
                f"{tuple(eps.shape)} came."
            )
        return
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise InputError(f"eps must be a number in pixel units, for example 0.1 or 8 / 255, not {eps!r}.")
    if not math.isfinite(eps) or eps < 0:
        raise InputError(f"eps must be a finite number that is not negative, but it is {eps}.")


class _Ball:
    """What both balls share; not a threat set by itself."""

    eps: float | Tensor

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def select(self, rows: Tensor) -> Threat:
        """The threat set of these inputs of a batch: itself, unless each input has an eps of its own."""
        return type(self)(self.eps[rows]) if isinstance(self.eps, Tensor) and self.eps.dim() else self

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest box (lower, upper), each shaped like `x`, that holds the threat set of `x` in [0, 1].

        It is x - eps and x + eps cut to [0, 1], for either norm. Nothing is checked here, so that it
        compiles; :func:`check_inputs` does that.
        """
        return (x - self.eps).clamp(0.0, 1.0), (x + self.eps).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LinfBall(_Ball):
    """Every pixel moves by at most `eps` and stays in [0, 1]; eps 0 leaves the clean input alone."""

    eps: float | Tensor
    norm: ClassVar[str] = "linf"

    def contains(self, x: Tensor, x_adv: Tensor, tolerance: float = 1e-6) -> Tensor:
        """(batch,) bool: is `x_adv` in the threat set of `x`, up to `tolerance` for rounding? NaN is not."""
        distance = (x_adv.double() - x.double()).abs()
        return (
            ((distance <= _each(self.eps, distance) + tolerance) & _in_pixel_range(x_adv, tolerance)).flatten(1).all(1)
        )

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """The point of the threat set of `x` next to each `x_adv` (Euclidean)."""
        lower, upper = self.box(x)
        return torch.minimum(torch.maximum(x_adv, lower), upper)


@dataclass(frozen=True)
class L2Ball(_Ball):
    """The image moves by at most `eps` in the Euclidean norm over all its values, and stays in [0, 1]."""

    eps: float | Tensor
    norm: ClassVar[str] = "l2"

    def contains(self, x: Tensor, x_adv: Tensor, tolerance: float = 1e-6) -> Tensor:
        """(batch,) bool: is `x_adv` in the threat set of `x`, up to `tolerance` for rounding? NaN is not."""
        distance = (x_adv.double() - x.double()).flatten(1).norm(dim=1)
        return (distance <= _each(self.eps, distance) + tolerance) & _in_pixel_range(x_adv, tolerance).flatten(1).all(1)

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Each `x_adv` brought into the threat set of `x` (needs `x` in [0, 1]); what is inside stays put.

        Radially into the ball, then cut to [0, 1]. The cut cannot leave the ball again: `x` is in [0, 1], so
        moving a pixel that lies outside to the nearer end brings it closer to `x`'s pixel. (The result lies
        in both, though it is not always their point nearest to `x_adv`.) The radius is shortened by the most
        that rounding to the input's dtype can add, so the result is inside without any tolerance.
        """
        start = x.double()
        step = x_adv.double() - start
        length = step.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        rounding = torch.finfo(x.dtype).eps * math.sqrt(x[0].numel()) if len(x) else 0.0
        radius = torch.as_tensor(self.eps - rounding, dtype=torch.float64, device=x.device).clamp(min=0.0)
        inward = start + step * (radius / length.clamp(min=1e-300))
        return torch.where(length <= self.eps, x_adv.double(), inward).to(x.dtype).clamp(0.0, 1.0)


def _each(eps: float | Tensor, like: Tensor) -> float | Tensor:
    """An eps for each input in the shape of ``like``: (batch,) or (batch, 1, ..., 1)."""
    return eps.view(-1, *[1] * (like.dim() - 1)) if isinstance(eps, Tensor) and eps.dim() else eps


Threat = LinfBall | L2Ball

_BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"linf": LinfBall, "l2": L2Ball}


def threat(norm: str, eps: float | Tensor) -> Threat:
    """The threat set of that norm ("linf" or "l2") and radius; InputError for other norms or bad radii."""
    if norm not in _BALLS:
        raise InputError(f"The norm of a threat set must be one of {', '.join(_BALLS)}, not {norm!r}.")
    return _BALLS[norm](eps)


def check_inputs(x: Tensor, y: Tensor, classes: int) -> None:
    """Raise InputError unless `x` is (batch, ...) floats in [0, 1] and `y` is (batch,) class numbers."""
    check_images(x)
    check_labels(y, len(x), classes)


def check_images(x: Tensor) -> None:
    """Raise InputError unless `x` is (batch, ...) floats in [0, 1]."""
    if not x.is_floating_point() or x.dim() < 2:
        raise InputError(
            f"Inputs must be a floating-point tensor of shape (batch, ...), not {x.dtype} of shape "
            f"{tuple(x.shape)}. {PIXEL_UNITS}"
        )
    if len(x) == 0:
        return
    if not torch.isfinite(x).all():
        raise InputError("The inputs hold NaN or infinite values; find and remove or repair those images.")
    low, high = x.min().item(), x.max().item()
    if low < 0.0 or high > 1.0:
        raise InputError(f"The inputs range from {low:g} to {high:g}. {PIXEL_UNITS}")


def class_numbers(y: Tensor) -> Tensor:
    """Labels (batch,) as int64, for bytes would be a mask where they index; InputError for what is no class numbers."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.dim() != 1:
        raise InputError(
            f"Labels must be a tensor of integer class numbers of shape (batch,), not {y.dtype} of shape "
            f"{tuple(y.shape)}."
        )
    return y.long()


def check_labels(y: Tensor, n: int, classes: int) -> None:
    """Raise InputError unless `y` is (n,) integers from 0 to classes - 1."""
    class_numbers(y)
    if n != len(y):
        raise InputError(f"Each input needs one label, but {n} inputs came with {len(y)} labels.")
    if n == 0:
        return
    first, last = int(y.min()), int(y.max())
    if first < 0 or last >= classes:
        raise InputError(
            f"Labels must be from 0 to {classes - 1} for a model of {classes} outputs, but they range from "
            f"{first} to {last}; check that the labels and the model belong to the same data set."
        )


def _in_pixel_range(x: Tensor, tolerance: float) -> Tensor:
    return (x >= -tolerance) & (x <= 1.0 + tolerance)
