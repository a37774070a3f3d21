"""From counts to a probability that holds with confidence, and from that to a radius: pure functions of numbers."""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certifiers.errors import InputError
from certifiers.smoothing.kinds import noise_kind


def lower_confidence_bound(successes: int, n: int, alpha: float) -> float:
    """A p such that P(success) >= p with probability at least 1 - alpha over the `n` samples, of which `successes`.

    The one-sided bound of Clopper and Pearson (1934), by statsmodels: the `alpha` quantile of
    Beta(successes, n - successes + 1). It is exact, never approximate: its error is at most alpha for every n and p.
    With all n samples successes it is alpha^(1/n), the most that n samples can ever show.
    """
    return float(lower_confidence_bounds(successes, n, alpha))


def lower_confidence_bounds(successes: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """The same for an array of successes, each among `n` samples of its own."""
    check_confidence(alpha)
    check_samples(n)
    successes = np.asarray(successes)
    if not np.all((successes >= 0) & (successes <= n)):
        raise InputError(f"Of {n} samples, 0 to {n} can be successes, but {successes} came.")
    from statsmodels.stats.proportion import proportion_confint  # slow to import, and only needed here

    found = proportion_confint(np.maximum(successes, 1), n, alpha=2 * alpha, method="beta")[0]  # alpha on either side
    return np.where(successes == 0, 0.0, found)


def certified_radius(p_lower: float, sigma: float, noise: str = "gaussian", slack: float = 0.0) -> float:
    """The radius within which the smoothed classifier keeps its class, 0.0 where none is certified.

    A class that has probability p_lower > 1/2 or more under noise of standard deviation `sigma` stays the most
    probable one at every input nearer than the radius: sigma * Phi^-1(p_lower) in l2 for Gaussian noise (theorem 1 of
    Cohen et al. 2019, the runner-up at most 1 - p_lower), 2 sqrt(3) sigma * (p_lower - 1/2) in l1 for uniform noise
    (Lee et al. 2019, Yang et al. 2020); see :mod:`kinds`. In the units of sigma, pixels. `slack` is taken off, as
    far as there is any: what :func:`snapping_slack` says for inputs that are snapped to a grid.
    """
    check_sigma(sigma)
    if not 0.0 <= p_lower <= 1.0:
        raise InputError(f"A probability must lie in [0, 1], but {p_lower!r} came.")
    kind = noise_kind(noise)
    if p_lower <= 0.5:
        return 0.0
    return max(sigma * float(kind.radius(p_lower)) - slack, 0.0)


def snapping_slack(spacing: float, numbers: int, norm: str) -> float:
    """By how much two inputs of so many numbers can get farther apart, in `norm` and pixels, when both are snapped.

    Each of them moves by half of the grid's `spacing` or less in each number, and the two by all of it: sqrt(numbers)
    times the spacing in l2, numbers times in l1. So a classifier that is constant on the grid within a radius of a
    snapped input is, if it snaps what it is given, constant within that radius less this around the input as it came.
    """
    return spacing * (math.sqrt(numbers) if norm == "l2" else numbers)


def radius_text(radius: float, digits: int = 3) -> str:
    """A radius with so many digits, rounded *down*: what is printed is certified too."""
    if math.isinf(radius):
        return "inf"
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def check_sigma(sigma: float) -> None:
    """Raise InputError unless sigma is a positive finite number."""
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not math.isfinite(sigma) or sigma <= 0:
        raise InputError(
            "sigma, the standard deviation of the noise in pixel units, must be a positive number such as 0.25, but "
            f"{sigma!r} came."
        )


def check_confidence(alpha: float) -> None:
    """Raise InputError unless alpha is strictly between 0 and 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < 1.0:
        raise InputError(
            "alpha, the probability that a certificate may be wrong, must lie strictly between 0 and 1, for example "
            f"0.001, but {alpha!r} came."
        )


def check_samples(n: int, name: str = "n") -> None:
    """Raise InputError unless `n` is a whole number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"{name}, a number of noisy samples, must be a whole number of at least 1, but {n!r} came.")
