"""Randomized smoothing: bounds by hand and against scipy, closed forms, coverage, the noise's seeds, an attack."""

import math

import numpy
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parametrize

from certifiers.errors import InputError
from certifiers.smoothing import (
    SmoothedClassifier,
    certified_radius,
    lower_confidence_bound,
    radius_text,
)
from certifiers.smoothing.noise import BLOCK, fill_gaussian, stream
from certifiers.smoothing.sampling import class_counts, sole_winners, suggested_batch
from certifiers.verdict import model_hash
from tests.nets import CLASSES, HalfSpace, images, tiny_bn, tiny_conv, tiny_mlp

CPU = torch.device("cpu")

# ---- the confidence bound


@pytest.mark.parametrize("n", [1, 7, 100, 10_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_all_successes_by_hand(n, alpha):
    assert lower_confidence_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-12)
    assert lower_confidence_bound(0, n, alpha) == 0.0


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001, 1e-6])
def test_the_bound_is_the_one_of_two_other_implementations(alpha):
    for n in (5, 100, 10_000):
        for k in {1, 2, n // 3, n // 2 + 1, n - 1, n} - {0}:
            bound = lower_confidence_bound(k, n, alpha)
            assert bound == pytest.approx(stats.beta.ppf(alpha, k, n - k + 1), rel=1e-9)
            exact = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
            assert bound == pytest.approx(exact.low, rel=1e-6)
            assert stats.binom.sf(k - 1, n, bound) == pytest.approx(alpha, rel=1e-6)  # what defines it


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.99, 0.999])
def test_the_bound_fails_at_most_alpha_of_the_time(p):
    """Exactly, over all outcomes of n samples: no simulation, no slack."""
    for n, alpha in ((100, 0.05), (1000, 0.001)):
        counts = numpy.arange(n + 1)
        above = [lower_confidence_bound(int(k), n, alpha) > p for k in counts]
        failure = stats.binom.pmf(counts, n, p)[above].sum()
        assert failure <= alpha


def test_coverage_of_the_whole_procedure_by_simulation():
    """3,000 certificates of inputs whose probability is known: a radius beyond the plane at most alpha of the time."""
    model, sigma, alpha, each = HalfSpace(), 0.2, 0.05, 600
    for place, p in enumerate((0.5, 0.6, 0.9, 0.99, 0.999)):
        distance = sigma * stats.norm.ppf(p)
        x = model.at([distance] * each)
        numbers = range(place * each, (place + 1) * each)
        found = SmoothedClassifier(model, 2, sigma).certify(x, n0=20, n=100, alpha=alpha, indices=numbers)
        wrong = sum(c.radius > distance + 1e-6 if c.prediction == 1 else c.radius > 0 for c in found)
        assert wrong / each <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / each), p
        if p == 0.6:  # and the bound is not idle: here it does go wrong now and then
            assert wrong > 0


def test_bad_numbers_of_bounds():
    for alpha in (0, 1, -0.1, 1.5, math.nan, "0.1", True):
        with pytest.raises(InputError, match="alpha"):
            lower_confidence_bound(5, 10, alpha)
    for n in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="at least 1"):
            lower_confidence_bound(0, n, 0.1)
    for successes in (-1, 11):
        with pytest.raises(InputError, match="0 to 10"):
            lower_confidence_bound(successes, 10, 0.1)


# ---- the radius


def test_the_largest_radii_that_samples_can_certify():
    largest = [certified_radius(lower_confidence_bound(n, n, 0.001), 1.0) for n in (10_000, 100_000)]
    assert 3.19 < largest[0] <= 3.20
    assert round(largest[1], 2) == 3.81


def test_radius_by_hand():
    assert certified_radius(0.8413447460685429, 0.5) == pytest.approx(0.5)  # Phi(1)
    assert certified_radius(0.9772498680518208, 0.25) == pytest.approx(0.5)  # Phi(2)
    assert certified_radius(0.5, 1.0) == certified_radius(0.3, 1.0) == certified_radius(0.0, 1.0) == 0.0
    assert 0 < certified_radius(0.5 + 1e-12, 1.0) < 1e-11
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="probability"):
            certified_radius(p, 1.0)
    for sigma in (0.0, -1, math.nan, math.inf, "1", True):
        with pytest.raises(InputError, match="sigma"):
            certified_radius(0.9, sigma)


def test_printed_radii_are_rounded_down():
    assert radius_text(0.29999) == "0.299" and radius_text(1.5) == "1.500" and radius_text(0.9999, 1) == "0.9"
    assert radius_text(0.0) == "0.000" and radius_text(math.inf) == "inf"
    for radius in numpy.random.default_rng(0).uniform(0, 4, 200):
        assert radius - 1e-3 < float(radius_text(radius)) <= radius


# ---- noise and counts


def test_a_sample_is_the_same_however_many_are_drawn_at_once():
    shape = (3, 5, 5)  # 75 entries: no multiple of a vector's width
    whole = torch.empty(4 * BLOCK, *shape)
    fill_gaussian(whole, 0.5, stream(1, 2, "estimate", CPU))
    for sizes in ((1, 3), (2, 2), (3, 1), (1, 1, 1, 1)):
        generator = stream(1, 2, "estimate", CPU)
        parts = [torch.empty(size * BLOCK, *shape) for size in sizes]
        for part in parts:
            fill_gaussian(part, 0.5, generator)
        assert torch.equal(torch.cat(parts), whole), sizes
    assert whole.std().item() == pytest.approx(0.5, rel=0.01) and abs(whole.mean().item()) < 0.01
    assert stats.kstest(whole.flatten()[:20_000].numpy(), "norm", args=(0, 0.5)).pvalue > 1e-4


def test_noise_differs_between_seeds_inputs_and_purposes():
    draws = []
    for seed, index, purpose in ((0, 0, "select"), (1, 0, "select"), (0, 1, "select"), (0, 0, "estimate"), (1, 1, "x")):
        draws.append(torch.empty(BLOCK, 50))
        fill_gaussian(draws[-1], 1.0, stream(seed, index, purpose, CPU))
    correlations = numpy.corrcoef(torch.stack(draws).flatten(1).numpy()) - numpy.eye(len(draws))
    assert abs(correlations).max() < 0.05


@pytest.mark.parametrize("net", [tiny_conv, tiny_bn, tiny_mlp])
def test_counts_do_not_depend_on_batches_order_or_shards(net):
    x, _ = images(5)
    classifier = SmoothedClassifier(net(), CLASSES, 0.3)
    whole = classifier.certify(x, n0=30, n=430, seed=7)
    for batch_size in (1, 17, 100, 130, 250, 100_000):
        assert classifier.certify(x, n0=30, n=430, seed=7, batch_size=batch_size) == whole, batch_size
    shards = [classifier.certify(x[rows], n0=30, n=430, seed=7, indices=rows) for rows in ([3, 1], [4], [0, 2])]
    by_number = dict(zip((3, 1, 4, 0, 2), (c for shard in shards for c in shard), strict=True))
    assert [by_number[number] for number in range(5)] == whole
    assert all(sum(c.counts) == 430 and sum(c.selection) == 30 for c in whole)
    assert classifier.certify(x, n0=30, n=430, seed=8) != whole


def test_the_class_is_selected_on_other_noise_than_it_is_estimated_on():
    x, _ = images(20)
    found = SmoothedClassifier(tiny_conv(), CLASSES, 0.5).certify(x, n0=200, n=200)
    unsure = [c for c in found if max(c.counts) < 180]
    assert len(unsure) > 4 and sum(c.selection != c.counts for c in unsure) > 0.8 * len(unsure)


def test_global_random_numbers_and_the_model_stay_as_they_are():
    model, (x, _) = tiny_bn(), images(2)
    before, hashed = torch.get_rng_state(), model_hash(model)
    SmoothedClassifier(model, CLASSES, 0.3).certify(x, n0=10, n=50)
    assert torch.equal(torch.get_rng_state(), before) and model_hash(model) == hashed
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_noise_is_added_in_pixel_units_and_not_clipped():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    x = torch.full((1, 1, 4, 4), 0.9)
    SmoothedClassifier(Watch().eval(), 2, 0.5).certify(x, n0=100, n=2000)
    noisy = torch.cat([batch for batch in seen if len(batch) > 1])
    assert noisy.dtype == torch.float32 and len(noisy) == 2100
    assert noisy.max() > 2 and noisy.min() < -0.5  # 0.9 and more than two sigma either way
    assert (noisy - 0.9).std().item() == pytest.approx(0.5, rel=0.02)


def test_a_tie_counts_for_nobody():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [0.0, -1.0, -0.0], [0.5, 0.0, -1.0]])
    assert sole_winners(logits).tolist() == [1, 1, 0]

    class Dead(nn.Module):  # what a pruned network can become: the same logits whatever comes in
        def forward(self, x):
            return x.new_zeros(len(x), 3)

    x = torch.rand(1, 4)
    (found,) = SmoothedClassifier(Dead().eval(), 3, 0.5).certify(x, n0=10, n=1000)
    assert found.prediction is None and found.radius == 0.0 and found.counts == (0, 0, 0)
    assert SmoothedClassifier(Dead().eval(), 3, 0.5).predict(x) == [None]


def test_counts_are_integers_of_the_whole_sum():
    model, x = HalfSpace(), torch.zeros(6)
    model.b.zero_()
    counts = class_counts(model, x, lambda out: out.zero_(), 250, 2)  # on the plane: every sample is a tie
    assert counts.dtype == torch.int64 and counts.tolist() == [0, 0]
    counts = class_counts(HalfSpace(), HalfSpace().at([0.1])[0], lambda out: out.zero_(), 250, 2)
    assert counts.tolist() == [0, 250]
    assert suggested_batch(x) == BLOCK


# ---- certificates


def test_a_half_space_is_never_certified_beyond_its_plane():
    """The smoothed probability is Phi(distance / sigma), the true radius the distance: approached, never passed."""
    model, sigma = HalfSpace(), 0.25
    distances = [side * far for far in numpy.linspace(0.01, 1.2, 30) for side in (1, -1)]
    x = model.at(distances).clamp(0, 1)
    classifier = SmoothedClassifier(model, 2, sigma)
    found = classifier.certify(x, n0=100, n=20_000, alpha=1e-6, batch_size=20_000)  # 60 inputs: no failure due
    true = model.distance(x).tolist()
    for certificate, distance in zip(found, true, strict=True):
        if certificate.prediction is None:
            assert abs(distance) < 0.05
            continue
        assert certificate.prediction == (distance > 0)
        assert certificate.radius <= abs(distance) + 1e-6
        share = certificate.counts[certificate.prediction] / 20_000
        assert share == pytest.approx(stats.norm.cdf(abs(distance) / sigma), abs=0.015)
        if 0.2 < abs(distance) < 2 * sigma:
            assert certificate.radius > 0.9 * abs(distance)


@pytest.fixture(scope="module")
def trained():
    """A small network on digits, trained under noise, and test images with their labels."""
    from certprune.data import load_data

    data = load_data("digits", seed=0, validation=0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        rows = torch.randint(len(data.train.y), (128,))
        x = data.train.x[rows] + 0.25 * torch.randn(128, *data.shape)
        loss = nn.functional.cross_entropy(model(x), data.train.y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), data.test.x[:40], data.test.y[:40]


def test_no_attack_within_the_radius_changes_the_smoothed_prediction(trained):
    model, x, y = trained
    classifier = SmoothedClassifier(model, 10, 0.25)
    found = classifier.certify(x, n0=100, n=1000, alpha=1e-4)
    moved, kept = [], []
    for row, certificate in enumerate(found):
        if certificate.prediction is None:
            continue
        # Towards the runner-up, along the gradient of the smoothed margin, to just inside the certified ball.
        second = torch.tensor(certificate.counts).topk(2).indices[-1].item()
        point = x[row].clone()
        for _ in range(5):
            point.requires_grad_(True)
            probabilities = model(point + 0.25 * torch.randn(500, *point.shape)).softmax(1)
            margin = (probabilities[:, certificate.prediction] - probabilities[:, second]).mean()
            (gradient,) = torch.autograd.grad(margin, point)
            step = point.detach() - x[row] - certificate.radius * gradient / gradient.norm()
            point = x[row] + step * min(1.0, 0.999 * certificate.radius / step.norm().item())
        moved.append(point)
        kept.append(certificate)
    assert len(kept) > 30 and sum(c.prediction == label for c, label in zip(found, y.tolist(), strict=True)) > 30
    for point, certificate in zip(moved, kept, strict=True):
        generator = torch.Generator().manual_seed(99)
        noise = torch.randn(4000, *point.shape, generator=generator)
        winner = model(point + 0.25 * noise).argmax(1).bincount(minlength=10)
        assert winner.argmax() == certificate.prediction
    gone = [c for point, c in zip(moved, kept, strict=True) if c.radius < 0.3]
    assert gone, "the attack should also have met small radii"


def test_prediction_is_returned_only_when_it_is_clear():
    model = HalfSpace()
    classifier = SmoothedClassifier(model, 2, 0.25)
    x = model.at([0.5, -0.3, 0.0, 1e-4]).clamp(0, 1)
    assert classifier.predict(x, n=500) == [1, 0, None, None]
    assert classifier.predict(x[:1], n=3) == [None]  # the most that three samples can show is p = 1/4
    near = model.at([0.02] * 400)  # p = 0.53: mostly abstained, wrong at most alpha of the time
    answers = classifier.predict(near, n=200, alpha=0.05)
    assert answers.count(0) <= 0.05 * 400 and answers.count(None) > 200


def test_abstains_where_a_majority_is_not_shown():
    model = HalfSpace()
    far, close = SmoothedClassifier(model, 2, 0.25).certify(model.at([2.0, 0.002]).clamp(0, 1), n=1000)
    assert str(far).startswith("class 1 within l2 radius 0.") and float(str(far).split()[-1]) <= far.radius
    assert (
        str(close) == "abstained"
        and close.prediction is None
        and close.radius == 0.0
        and close.p_lower <= 0.5
        and sum(close.counts) == 1000
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": -0.5}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"num_classes": 1}, "2 classes"),
        ({"num_classes": 9}, "10 logits, but num_classes is 9"),
        ({"n": 0}, "n, a number of noisy samples"),
        ({"n0": 0}, "n0, a number of noisy samples"),
        ({"n": 10.5}, "whole number"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"batch_size": 0}, "batch size"),
        ({"indices": [1]}, "1 indices"),
        ({"x": torch.full((2, 1, 8, 8), 1.5)}, "pixel units"),
        ({"x": torch.full((2, 1, 8, 8), math.nan)}, "NaN"),
        ({"x": torch.zeros(2, 1, 8, 8, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "does not take inputs"),
    ],
)
def test_bad_settings_and_inputs(change, saying):
    given = {"sigma": 0.25, "num_classes": CLASSES, "n": 10, "n0": 10, "alpha": 0.001, "x": images(2)[0]} | change
    with pytest.raises(InputError, match=saying):
        classifier = SmoothedClassifier(tiny_conv(), given.pop("num_classes"), given.pop("sigma"))
        classifier.certify(given.pop("x"), **given)


class _Identity(nn.Module):
    def forward(self, x):
        return x


def test_models_that_cannot_be_certified():
    x, _ = images(1)
    with pytest.raises(InputError, match="eval mode"):
        SmoothedClassifier(tiny_conv().train(), CLASSES, 0.25)
    masked = tiny_conv()
    parametrize.register_parametrization(masked[0], "weight", _Identity())
    with pytest.raises(InputError, match="materialize"):
        SmoothedClassifier(masked, CLASSES, 0.25)
    classifier = SmoothedClassifier(tiny_bn(), CLASSES, 0.25)
    classifier.model.train()  # later on
    for ask in (classifier.certify, classifier.predict):
        with pytest.raises(InputError, match="eval mode"):
            ask(x, n=10)

    class Overflows(nn.Module):  # finite at the clean input, not under noise
        def forward(self, x):
            return torch.exp(1e4 * (x.flatten(1)[:, :2] - 1.0).clamp(min=0.0))

    with pytest.raises(InputError, match="noisy input is NaN or infinite"):
        SmoothedClassifier(Overflows().eval(), 2, 0.5).certify(x, n=200)
