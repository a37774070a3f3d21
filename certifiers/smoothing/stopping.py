"""When to stop sampling one input: as soon as its counts say enough about its radius.

The bounds behind it hold at all times at once (:mod:`anytime`), so that a rule may look at the counts as often as it
likes, and whatever it is, the certificate stays valid. A rule decides what is paid, never what is proven. It sees one
input's own counts alone, so that runs that are cut off or divided stop at the same sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from certifiers.errors import InputError
from certifiers.smoothing.anytime import lower_sequence, refuted
from certifiers.smoothing.kinds import Kind
from certifiers.smoothing.noise import BLOCK

GROWTH = 16  # after so many blocks the rule is asked less often: each time 1 / GROWTH more samples are there
_BEYOND = 1e-7  # in log odds: a radius counts as reached only if rounding cannot take it back


@dataclass(frozen=True)
class Stopping:
    """Stop once one of these is so; radii are in pixels, in the norm of the noise.

    ``tolerance``: the n samples that are allowed would add no more than this to the radius, going by the frequency
    so far and one standard error more; or the radius is `up_to` or more. For a whole curve, up to that radius. While
    some radius is in reach, sampling goes on until one is certified, however small.

    ``radii``: each of them is decided: certified, or above what is still possible. For the columns of a table. Radius
    0 is decided when some radius is certified, or none can be any more.

    Either way sampling ends where nothing can be certified any more, and after n samples. Raises InputError for a
    rule that says nothing, and for numbers out of range.
    """

    tolerance: float | None = None
    up_to: float | None = None
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted(set(self.radii))))
        if self.tolerance is None and not self.radii:
            raise InputError(
                "To stop early, give a tolerance for the radius, for example 0.02, or the radii that are to be decided."
            )
        if self.tolerance is None and self.up_to is not None:
            raise InputError("up_to says how far a curve goes whose tolerance is given: give a tolerance too.")
        named = (("The tolerance", self.tolerance), ("up_to", self.up_to))
        for name, value in [(name, value) for name, value in named if value is not None]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} is a radius in pixels above 0, for example 0.02, but {value!r} came.")
        if not all(0 <= radius < math.inf for radius in self.radii):
            raise InputError(f"The radii to decide must be numbers of at least 0, but {self.radii} came.")

    def header(self) -> dict[str, Any]:
        """What a ledger says of it."""
        return {
            "bound": "betting",
            "tolerance": self.tolerance,
            "up_to": self.up_to,
            "radii": list(self.radii),
            "block": BLOCK,
            "growth": GROWTH,
        }

    def enough(
        self,
        successes: ArrayLike,
        samples: ArrayLike,
        n: int,
        alpha: float,
        kind: Kind,
        sigma: float,
        *,
        slack: float = 0.0,
    ) -> NDArray[np.bool_]:
        """Whether to stop after so many successes in so many samples, of the n that are allowed; arrays broadcast.

        `slack`, in pixels, is what will be taken off the radius (:func:`~certifiers.smoothing.bounds.snapping_slack`):
        the radii of the rule are those that are left.
        """
        k, seen = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(samples, dtype=np.float64))
        stop = (seen >= n) | refuted(seen - k, seen, 0.5, alpha)  # it is below one half
        if self.radii:
            stop = stop | self._decided(k, seen, alpha, kind, sigma, slack)
        if self.tolerance is not None:
            stop = stop | self._known(k, seen, n, alpha, kind, sigma, slack)
        return stop

    def _decided(
        self, k: NDArray[np.float64], seen: NDArray[np.float64], alpha: float, kind: Kind, sigma: float, slack: float
    ) -> NDArray[np.bool_]:
        p = kind.probability((np.asarray(self.radii) + slack) / sigma)
        k, seen = k[..., None], seen[..., None]
        return (_reached(k, seen, p, alpha) | refuted(seen - k, seen, 1.0 - p, alpha)).all(-1)

    def _known(
        self,
        k: NDArray[np.float64],
        seen: NDArray[np.float64],
        n: int,
        alpha: float,
        kind: Kind,
        sigma: float,
        slack: float,
    ) -> NDArray[np.bool_]:
        share = k / seen
        likely = np.minimum(share + np.sqrt(share * (1.0 - share) / seen), 1.0)
        most = sigma * kind.radius(np.maximum(_projected(likely, n, alpha), 0.5)) - slack
        up_to = math.inf if self.up_to is None else self.up_to
        goal = np.maximum(np.where(most < up_to, most - self.tolerance, up_to), 0.0)  # 0: any radius at all
        return (most <= 0.0) | _reached(k, seen, kind.probability((goal + slack) / sigma), alpha)


def looks(n: int) -> list[int]:
    """After how many samples a rule is asked: every block at first, then after 1/GROWTH more each time; `n` last."""
    found, blocks = [], 0
    while blocks * BLOCK < n:
        blocks += max(1, blocks // GROWTH)
        found.append(min(blocks * BLOCK, n))
    return found


def _projected(share: NDArray[np.float64], n: int, alpha: float) -> NDArray[np.float64]:
    """The lower bound after n samples of which such a share succeeds, interpolated in log odds."""
    odds, bounds = _table(n, alpha)
    return expit(np.interp(logit((share * n + 0.5) / (n + 1.0)), odds, bounds))


@lru_cache(maxsize=8)
def _table(n: int, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log odds of successes among n samples, from a half of them to all, and those of their lower bounds."""
    odds = np.linspace(0.0, logit((n + 0.5) / (n + 1.0)), 300)
    successes = np.clip(expit(odds) * (n + 1.0) - 0.5, 0.0, n)
    return odds, logit(lower_sequence(successes, n, alpha))


def _reached(k: NDArray[np.float64], seen: NDArray[np.float64], p: NDArray[np.float64], alpha: float) -> Any:
    """Whether the lower bound is at p, by more than rounding; p = 1 never is."""
    return refuted(k, seen, expit(logit(p) + _BEYOND), alpha)
