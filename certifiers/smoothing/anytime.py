"""A confidence sequence for a probability: bounds that hold at every number of samples at once, found by betting.

Against the claim "success has probability m" one bets: a player starts with 1 and after each sample multiplies what
they have by a factor whose mean is 1 if the claim is true. Ville (1939): the chance that such a wealth *ever* reaches
1/alpha is at most alpha. So the claims against which the wealth has not reached 1/alpha hold the true probability at
all times at once, with probability at least 1 - alpha, and sampling may stop whenever one likes, for any reason.
Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), here for samples that are 0 or 1.

The player divides the first capital over some ratios r < 1. The share of r bets as if the odds of success were 1/r
times those of the claim: its factor is 1 / (m + (1 - m) r) after a success and r / (m + (1 - m) r) after a failure
(mean 1 at m), so that after k successes in n samples it is

    r^(n - k) / (m + (1 - m) r)^n,

a function of the counts alone that falls as m rises. The wealth, a weighted sum of these, falls too: what is not
refuted is an interval up from one bound, found by bisection. (Theorem 3 of the paper asks no more: any weights, any
bets.) The counts may be numbers, or arrays of equal shape: of many inputs, or of many moments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, xlogy

from certifiers.errors import InputError
from certifiers.smoothing.bounds import check_confidence

# Against a claim the best ratio is its odds over those of the truth: the nearer the two, the more samples it takes to
# tell them apart, so that ratios near 1 serve large n. Ratio 0 stakes all on success, which is best where nothing
# fails: there n samples show alpha^(1/n) as the fixed-n bound does, with alpha times this ratio's weight.
_FINE = 8
RATIOS = np.array([0.0, *np.exp(-np.geomspace(3.0, 0.03, _FINE))])
WEIGHTS = np.array([0.4, *[0.6 / _FINE] * _FINE])

_ODDS = 40.0  # the bisection is over the claim's log odds, from - to +, in steps that end 1e-10 below the bound
_STEPS = 40
_SLACK = 1e-6  # in log wealth, above what rounding may add to it for any n up to 1e9


def log_wealth(successes: ArrayLike, n: ArrayLike, m: ArrayLike) -> NDArray[np.float64]:
    """The logarithm of the wealth against probability `m` (0 < m <= 1) after so many successes in `n` samples."""
    k, n, m = (np.asarray(value, dtype=np.float64)[..., None] for value in (successes, n, m))
    shares = xlogy(n - k, RATIOS) - n * np.log(m + (1.0 - m) * RATIOS)
    largest = shares.max(-1, keepdims=True)
    return np.log(np.exp(shares - largest) @ WEIGHTS) + largest[..., 0]


def refuted(successes: ArrayLike, n: ArrayLike, m: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Whether the claim that success has probability `m`, or less, is refuted: the lower bound is at least m."""
    return log_wealth(successes, n, m) >= _SLACK - np.log(alpha)


def lower_sequence(successes: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Lower bounds of a probability such that, with probability at least 1 - alpha, none of all n is ever above it.

    That is: for independent samples that succeed with probability p, P(for some n: bound > p) <= alpha, whatever p
    and however long the sequence. Rounded down. Raises InputError for counts or an alpha that cannot be.
    """
    check_confidence(alpha)
    k, n = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64))
    if not (np.all(n >= 0) and np.all(k >= 0) and np.all(k <= n)):
        raise InputError("Of n samples, 0 to n can be successes, but other counts came.")
    lower, upper = np.full(k.shape, -_ODDS), np.full(k.shape, _ODDS)
    for _ in range(_STEPS):
        middle = 0.5 * (lower + upper)
        rich = refuted(k, n, expit(middle), alpha)
        lower, upper = np.where(rich, middle, lower), np.where(rich, upper, middle)
    return np.where(lower > -_ODDS, expit(lower), 0.0)


def upper_sequence(successes: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Upper bounds of a probability, none of which is ever below it: one less the lower bounds of failure."""
    return 1.0 - lower_sequence(np.asarray(n) - np.asarray(successes), n, alpha)
