"""The kinds of noise that an input may be smoothed with: how each is drawn, and the radius that it certifies.

Both theorems bound how far the probability of a class can fall when the input moves, from its value p at the input
itself; the class stays the most probable one as long as its probability stays above one half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from certifiers.errors import InputError


@dataclass(frozen=True)
class Kind:
    """One kind of noise, independent in every pixel, of mean 0 and standard deviation sigma.

    ``radius(p)``, in units of sigma, is what a class of probability p > 1/2 is certified within, in `norm`;
    ``probability`` is its inverse. Both take numbers or arrays.
    """

    name: str
    norm: str
    radius: Callable[[ArrayLike], NDArray[np.float64]]
    probability: Callable[[ArrayLike], NDArray[np.float64]]


# Cohen et al. 2019 (arXiv 1902.02918), theorem 1, with the runner-up at most 1 - p: radius sigma * Phi^-1(p) in l2.
GAUSSIAN = Kind("gaussian", "l2", ndtri, ndtr)

# Noise from U[-w, w] in every pixel, w = sqrt(3) sigma: radius 2 w (p - 1/2) in l1. Lee et al. 2019 (arXiv
# 1906.04948), and Yang et al. 2020 (arXiv 2002.08118), who show that none larger holds for all classifiers. Moved by
# d, two such cubes share the fraction prod(max(1 - |d_i| / 2w, 0)) >= 1 - |d|_1 / 2w of their volume, and p can fall
# by no more than what they do not share: it stays above one half while |d|_1 < 2w (p - 1/2).
WIDTH = math.sqrt(3.0)  # of the half cube, in units of sigma
UNIFORM = Kind(
    "uniform",
    "l1",
    lambda p: 2.0 * WIDTH * (np.asarray(p, dtype=np.float64) - 0.5),
    lambda radius: np.minimum(0.5 + np.asarray(radius, dtype=np.float64) / (2.0 * WIDTH), 1.0),
)

KINDS = {kind.name: kind for kind in (GAUSSIAN, UNIFORM)}


def noise_kind(name: str) -> Kind:
    """The kind of this name; InputError for one that is not known."""
    if name not in KINDS:
        raise InputError(f"The noise must be {' or '.join(KINDS)}, but {name!r} came.")
    return KINDS[name]


def implied_radius(radius: float, norm: str, target: str, pixels: int) -> float:
    """The radius in norm `target` that a certificate within `radius` in `norm` implies, for inputs of so many numbers.

    The largest ball of the one norm inside the ball of the other: for p < q, |d|_p <= pixels^(1/p - 1/q) |d|_q, and
    |d|_q <= |d|_p. So an l2 radius implies radius / sqrt(pixels) in linf, and the same radius in l1. It is *implied*,
    not certified in its own right: noise that is made for the norm at hand may certify more.

    Raises InputError for a norm other than l1, l2 and linf, a negative radius, or less than one pixel.
    """
    powers = {"l1": 1.0, "l2": 0.5, "linf": 0.0}
    if norm not in powers or target not in powers:
        raise InputError(f"Norms must be l1, l2 or linf, but {norm!r} and {target!r} came.")
    if not radius >= 0.0 or pixels < 1:
        raise InputError(f"A radius of at least 0 and at least 1 pixel are needed, but {radius!r} and {pixels!r} came.")
    return radius / pixels ** max(powers[norm] - powers[target], 0.0)
