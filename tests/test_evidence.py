"""The statistics of a study, where the answer is known: by hand, by simulation, or by another implementation."""

from __future__ import annotations

import numpy
import pytest
from scipy import integrate, stats
from statsmodels.regression.linear_model import OLS

from certprune.reports.following import partial_correlation, pearson
from certprune.reports.paired_tests import clustered_p, crossed_difference, generalised_p, holm, mcnemar_p

T2 = 4.302652729911275  # the 97.5 % quantile of Student's t with 2 degrees of freedom


def drawn(dice, seeds=3, images=300, shift=0.0, by_seed=0.0, by_image=0.7):
    """Paired differences of two networks with random seeds and images; ``shift`` in favour of the first."""
    seen = dice.normal(size=(2, 1, images)) * by_image + dice.normal(size=(1, 1, images))
    noise = dice.normal(size=(2, seeds, images)) * 0.5 + dice.normal(size=(2, seeds, 1)) * by_seed
    first, second = (seen + noise + numpy.array([shift, 0.0])[:, None, None]) > -0.5
    return first.astype(int) - second


def test_crossed_variance_by_hand():
    """A table of 2 seeds by 3 images; mean squares with a pencil: 1/6 (seeds), 1/2 (images), 1/6 (the rest)."""
    gaps = numpy.array([[1, 0, 0], [1, 0, 1]])
    found = crossed_difference(gaps)
    assert found.difference.value == pytest.approx(0.5)
    known, uncertain, least = (1 / 2 - 1 / 6) / 6, (1 / 6) / 6, (1 / 6) / 6

    def p(u):
        return 2 * stats.norm.sf(0.5 / (max(uncertain / u, least) + known) ** 0.5) * stats.chi2.pdf(u, 1)

    parts = [integrate.quad(p, *ends, limit=200)[0] for ends in ((0, 0.01), (0.01, 1), (1, 60))]
    assert found.p == pytest.approx(sum(parts), rel=1e-4)


def test_generalised_p_has_student_and_the_normal_law_as_its_ends():
    for distance in (0.5, 3.0, 40.0, 1000.0):
        assert generalised_p(distance, 1.0, 0.0, 2) == pytest.approx(2 * stats.t.sf(distance, 2), rel=1e-3)
    assert generalised_p(2.5, 0.0, 1.0, 2) == pytest.approx(2 * stats.norm.sf(2.5))


def test_images_of_their_own_leave_a_t_test_over_the_seeds():
    gaps = drawn(numpy.random.default_rng(1), by_seed=0.3, images=100_000)  # so many that seeds are all the variance
    found = crossed_difference(gaps, same_images=False)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps.mean(axis=1), 0.0).pvalue, rel=1e-3)
    half = T2 * stats.sem(gaps.mean(axis=1))
    assert found.difference.upper == pytest.approx(gaps.mean() + half, rel=1e-3)


@pytest.mark.parametrize("by_seed", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("by_image", [0.0, 0.7])
def test_without_a_difference_p_is_about_uniform(by_seed, by_image):
    dice = numpy.random.default_rng(0)
    ps = numpy.array([crossed_difference(drawn(dice, by_seed=by_seed, by_image=by_image)).p for _ in range(400)])
    assert 0.005 <= (ps < 0.05).mean() <= 0.065  # conservative where seeds do not differ
    assert (ps < 0.01).mean() <= 0.02
    assert 0.35 <= (ps < 0.5).mean() <= 0.57


def test_forgetting_either_images_or_seeds_finds_what_is_not_there():
    """What the crossed test is for: McNemar over pooled seeds and a t-test over seeds are wrong far too often."""
    dice = numpy.random.default_rng(0)
    seeds_vary = [drawn(dice, by_seed=0.3) for _ in range(200)]
    pooled = [mcnemar_p(int((gaps == 1).sum()), int((gaps == -1).sum())) for gaps in seeds_vary]
    images_vary = [drawn(dice, by_image=1.5) for _ in range(200)]
    over_seeds = [crossed_difference(gaps, same_images=False).p for gaps in images_vary]
    assert (numpy.array(pooled) < 0.05).mean() > 0.3
    assert (numpy.array(over_seeds) < 0.05).mean() > 0.15


def test_a_strong_difference_is_found_with_three_seeds():
    dice = numpy.random.default_rng(0)
    found = [crossed_difference(drawn(dice, shift=1.0, by_seed=0.05, images=1000)) for _ in range(50)]
    assert sum(each.p < 0.01 for each in found) >= 48
    assert all(each.difference.lower > 0 for each in found if each.p < 0.05)


def test_interval_leaves_out_zero_exactly_where_p_is_below_a_twentieth():
    dice = numpy.random.default_rng(0)
    for _ in range(50):
        found = crossed_difference(drawn(dice, shift=0.1, by_seed=0.1))
        assert (found.p < 0.05) == (found.difference.lower > 0 or found.difference.upper < 0)


def test_seeds_that_agree_by_chance_prove_nothing():
    """Two networks whose images differ at random, ten more of a hundred right under each of three seeds."""
    dice = numpy.random.default_rng(0)
    gaps = numpy.array([dice.permutation([1] * 30 + [-1] * 20 + [0] * 50) for _ in range(3)])
    assert stats.ttest_1samp(gaps.mean(axis=1) + [0, 0, 1e-9], 0.0).pvalue < 1e-9
    assert crossed_difference(gaps).p > 0.005


def test_nor_do_seeds_with_images_of_their_own():
    """A data set that is split by the seed: either of two seeds has one image of a hundred more, McNemar's p is 1."""
    gaps = numpy.zeros((2, 100))
    gaps[0, :11], gaps[1, 20:31] = [1] * 6 + [-1] * 5, [-1] * 5 + [1] * 6
    found = crossed_difference(gaps, same_images=False)
    assert found.p > 0.5 and found.difference.lower < 0 < found.difference.upper
    dice = numpy.random.default_rng(0)
    null = [dice.choice([-1, 0, 1], p=[0.05, 0.9, 0.05], size=(2, 100)) for _ in range(400)]
    ps = numpy.array([crossed_difference(gaps, same_images=False).p for gaps in null])
    assert (ps < 1e-4).mean() == 0 and (ps < 0.05).mean() <= 0.06


def test_degenerate_tables():
    assert crossed_difference(numpy.ones((1, 5))).p is None
    assert crossed_difference(numpy.zeros((3, 5))).p == 1.0
    always = crossed_difference(numpy.ones((3, 5)))
    assert (always.p, always.difference.value, always.difference.lower) == (0.0, 1.0, 1.0)
    assert clustered_p(numpy.ones((1, 5))) is None and clustered_p(numpy.zeros((3, 5))) is None


def test_with_many_seeds_both_ways_agree():
    """The model's mean squares and statsmodels' clustered covariance estimate one variance, and seeds are no issue."""
    for seed in range(3):
        gaps = drawn(numpy.random.default_rng(seed), seeds=40, shift=0.03, by_seed=0.1)
        assert clustered_p(gaps) == pytest.approx(crossed_difference(gaps).p, abs=0.02)


def test_mcnemar_is_the_exact_binomial_test():
    for first, second in ((3, 12), (0, 5), (40, 41)):
        assert mcnemar_p(first, second) == pytest.approx(stats.binomtest(first, first + second).pvalue)
    assert mcnemar_p(0, 0) == 1.0


def test_holm_by_hand_leaves_out_what_has_no_p():
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([None]) == [None] and holm([]) == []


def test_partial_correlation_is_that_of_a_linear_models_residuals():
    dice = numpy.random.default_rng(0)
    levels = numpy.repeat([0.9, 0.95, 0.99], [7, 5, 9])
    x, y = dice.normal(size=(2, 21)) + 5 * levels
    factors = (levels[:, None] == numpy.unique(levels)).astype(float)
    left = [OLS(values, factors).fit().resid for values in (x, y)]
    assert partial_correlation(x, y, levels) == pytest.approx(pearson(*left))
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_what_sparsity_alone_moves_is_no_correlation_at_equal_sparsity():
    levels = numpy.repeat([0.0, 1.0], 4)
    x = numpy.array([1, -1, 1, -1, 11, 9, 11, 9.0])
    y = numpy.array([1, 1, -1, -1, 11, 11, 9, 9.0])
    assert pearson(x, y) > 0.9
    assert partial_correlation(x, y, levels) == pytest.approx(0.0, abs=1e-12)
    assert numpy.isnan(partial_correlation(levels, y, levels))
