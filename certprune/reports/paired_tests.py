"""Is one network better than another? Paired over the test images *and* over the seeds.

With the same images under every seed, the paired difference d[s, i] (1: only the first network is proven right on
image i, -1: only the second, 0: both or neither) is a crossed design: seeds are a sample of training runs, images a
sample of inputs, and the question is about new runs *and* new images. With random effects

    d[s, i] = difference + seed[s] + image[i] + rest[s, i]

the mean over S seeds and I images has variance (MS_seed + MS_image - MS_rest) / (S I) in the mean squares of the
two-way table: Clark's (1973) for subjects and items, and that of studies with several readers of the same cases
(Dorfman, Berbaum and Metz 1992). I is large, so all but MS_seed are as good as known; MS_seed has S - 1 degrees of
freedom, and with three seeds that is what matters. p is the generalised p value (Tsui and Weerahandi 1989; the
solution of Behrens and Fisher for two variances): the normal p, averaged over the variances that MS_seed leaves
plausible, MS_seed (S - 1) / chi2; but none below MS_rest, which is in MS_seed whatever the seeds do, so that seeds
which happen to agree prove nothing (where each seed has images of its own, none below what these alone explain). It is
Student's t over the seeds where these make the variance. Degrees of freedom after Satterthwaite (Hillis 2007) are the
usual way; simulated with three seeds they reject up to 4 % at 1 %, the generalised p value 1 % at most, and 1 to 5 %
at 5 %.

Why not a test that is at hand? McNemar's treats the seeds at hand as all there are, so it says nothing about another
training run (it is given for each seed beside this). A t-test over the seeds forgets that they share their images.
Two-way cluster-robust covariance (Cameron, Gelbach and Miller 2011; ``statsmodels``' ``cov_type="cluster"``) is the
same idea without a model, but its theory wants many clusters, and three seeds are three. It is given as a second
opinion, see :func:`clustered_p`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy
from scipy import stats
from scipy.optimize import brentq
from scipy.special import erfc

from certprune.reports.rows import Rate

TINY = 1e-15  # a variance below this is rounding


@dataclass(frozen=True)
class Crossed:
    """``difference`` with its 95 % interval, and the two-sided ``p`` of none. One seed alone has neither."""

    difference: Rate
    p: float | None = None


def crossed_difference(gaps: numpy.ndarray, same_images: bool = True) -> Crossed:
    """The mean of paired differences ``(seeds, images)`` for new seeds and new images.

    Not ``same_images``: each seed has images of its own, and then seeds carry all the variance there is (a paired
    t-test over them), which is no less than what images alone give a mean. Where every difference is equal, p is 1
    (all zero) or 0.
    """
    seeds, images = gaps.shape
    mean = float(gaps.mean())
    if seeds < 2:
        return Crossed(Rate(mean, None, None))
    by_seed, by_image = gaps.mean(axis=1), gaps.mean(axis=0)
    from_seeds, from_images, least = float(by_seed.var(ddof=1)) / seeds, 0.0, 0.0
    if same_images and images > 1:
        rest = gaps - by_seed[:, None] - by_image[None, :] + mean
        least = float((rest**2).sum()) / ((seeds - 1) * (images - 1)) / gaps.size
        from_images = max(float(by_image.var(ddof=1)) / images - least, 0.0)
    elif images > 1:
        least = float(gaps.var(axis=1, ddof=1).mean()) / gaps.size
    if max(from_seeds, least) + from_images < TINY:
        return Crossed(Rate(mean, mean, mean), 1.0 if abs(mean) < TINY else 0.0)

    def p_of(distance: float) -> float:
        return generalised_p(distance, from_seeds, from_images, seeds - 1, least)

    far = 2.0
    while p_of(far) > 0.05:
        far *= 2
    half = float(brentq(lambda distance: p_of(distance) - 0.05, 0.0, far, xtol=1e-12))
    return Crossed(Rate(mean, max(mean - half, -1.0), min(mean + half, 1.0)), p_of(abs(mean)))


def generalised_p(distance: float, uncertain: float, known: float, freedom: int, least: float = 0.0) -> float:
    """Two-sided p of ``distance`` under a normal law, the variance of which is the sum of a ``known`` one and one that
    was estimated as ``uncertain`` with so many degrees of ``freedom`` and is no less than ``least``. Student's t where
    nothing else is known.
    """
    u, weights = _chi2(freedom)
    variance = numpy.maximum(uncertain * freedom / u, least) + known
    return float(weights @ erfc(distance / numpy.sqrt(2 * variance)))


@lru_cache
def _chi2(freedom: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Values of chi2 and their weights, for means over its law: trapezoids on its logarithm."""
    u = numpy.exp(numpy.linspace(*numpy.log(stats.chi2.ppf([1e-13, 1 - 1e-13], freedom)), 801))
    weights = stats.chi2.pdf(u, freedom) * u
    return u, weights / weights.sum()


def clustered_p(gaps: numpy.ndarray) -> float | None:
    """p of a mean of zero with covariance clustered by seeds and by images, by statsmodels; None where it has none.

    A linear probability model of the paired difference with a constant alone; t with the smaller number of clusters
    less one as degrees of freedom. The estimate of a variance may come out negative, and then there is no p.
    """
    from statsmodels.regression.linear_model import OLS

    seeds, images = gaps.shape
    if seeds < 2:
        return None
    groups = numpy.stack(numpy.meshgrid(range(seeds), range(images), indexing="ij"), axis=-1).reshape(-1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the root of a negative variance
        model = OLS(gaps.ravel().astype(float), numpy.ones(gaps.size))
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
        p = float(fit.pvalues[0])
    return p if numpy.isfinite(p) and fit.bse[0] > 0 else None


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact McNemar: two-sided p that images which one of two networks alone certifies fall on either alike."""
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p values adjusted for being several (Holm 1979), so that one below 0.05 in any is rare if none is true."""
    from statsmodels.stats.multitest import multipletests

    known = [p for p in ps if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if p is None else float(next(adjusted)) for p in ps]
