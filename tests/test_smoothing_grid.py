"""The grid of inputs and noise: its spacing by hand, exact sums, and networks that look at the lowest bits."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from certifiers.smoothing import SmoothedClassifier, Stopping, certified_radius, lower_confidence_bound
from certifiers.smoothing.bounds import snapping_slack
from certifiers.smoothing.kinds import WIDTH
from certifiers.smoothing.noise import BLOCK, FILLS, fill_gaussian, grid, snapped, stream
from tests.nets import CLASSES, HalfSpace, images, tiny_conv

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)


def drawn(kind, sigma, dtype=torch.float32, shape=(7, 7)):
    out = torch.empty(20 * BLOCK, *shape, dtype=dtype)
    FILLS[kind](out, sigma, stream(0, 0, "estimate", CPU))
    return out


# ---- the grid


def test_spacing_by_hand():
    assert grid(0.25, torch.float32) == 2.0**-21  # 1 + 8 / 4 = 3 <= 2^2, and 2^2 times 2^-23
    assert grid(0.25, torch.float64) == 2.0**-50
    assert grid(0.125, torch.float32) == 2.0**-22  # 1 + 1 is 2^1 itself
    assert grid(0.126, torch.float32) == 2.0**-21
    assert grid(0.5, torch.float32) == 2.0**-20 and grid(1.0, torch.float32) == 2.0**-19  # 5 <= 2^3, 9 <= 2^4
    assert grid(1e-6, torch.float32) == 2.0**-22


def test_slack_by_hand():
    assert (
        snapping_slack(2.0**-21, 784, "l2") == 28 * 2.0**-21 and snapping_slack(2.0**-21, 784, "l1") == 784 * 2.0**-21
    )
    x = torch.rand(3, *SHAPE)
    assert SmoothedClassifier(HalfSpace(), 2, 0.25).slack(x) == 28 * 2.0**-21
    assert SmoothedClassifier(HalfSpace(), 2, 0.25, "uniform").slack(x.double()) == 784 * 2.0**-50
    assert certified_radius(0.9, 0.25, slack=0.1) == certified_radius(0.9, 0.25) - 0.1
    assert certified_radius(0.6, 0.25, slack=0.1) == 0.0 == certified_radius(0.5, 0.25, slack=0.1)


def test_snapped_inputs_are_nearest_and_stay_in_range():
    for dtype in (torch.float32, torch.float64):
        for sigma in (0.001, 0.25, 1.0, 3.0):
            s = grid(sigma, dtype)
            x = torch.cat([torch.rand(10_000, dtype=dtype), torch.tensor([0.0, 1.0, 1e-12], dtype=dtype)])
            before, there = x.clone(), snapped(x, s)
            assert torch.equal(x, before) and torch.equal(snapped(there, s), there)
            assert (there - x).abs().max() <= s / 2 and there.min() == 0 and there.max() == 1
            assert ((there / s).frac() == 0).all()


@pytest.mark.parametrize("kind", list(FILLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_exact(kind, dtype):
    """As whole numbers of spacings; and those of float32 as double precision adds them."""
    for sigma in (0.12, 0.25, 1.0):
        s, noise = grid(sigma, dtype), drawn(kind, sigma, dtype)
        x = snapped(torch.rand(7, 7, dtype=dtype), s)
        assert torch.equal(((noise + x) / s).long(), (noise / s).long() + (x / s).long())
        assert ((noise / s).frac() == 0).all()
        if dtype is torch.float32:
            assert torch.equal((noise + x).double(), noise.double() + x.double())
    plain = 0.25 * torch.randn(1000, 7, 7) + torch.rand(7, 7)  # which is what was wrong
    assert ((plain / 2.0**-21).frac() != 0).any()


def test_noise_is_what_the_generator_draws_rounded_down():
    out = torch.empty(2 * BLOCK, *SHAPE)
    generator = stream(0, 5, "select", CPU)
    for block in out.split(BLOCK):
        block.normal_(0.0, 0.25, generator=generator)
    found = torch.empty_like(out)
    fill_gaussian(found, 0.25, stream(0, 5, "select", CPU))
    s = grid(0.25, torch.float32)
    assert torch.equal(found, (out.double() / s).floor().mul(s).float())
    assert out.abs().max() > 4 * 0.25


def test_uniform_noise_is_as_wide_as_its_theorem_asks_and_hardly_more():
    for sigma in (0.25, 1.0):
        s = grid(sigma, torch.float32)
        numbers = (drawn("uniform", sigma, shape=(500,)) / s).long()
        half = math.ceil(WIDTH * sigma / s * (1 + 2**-10))
        assert -half <= numbers.min() and numbers.max() < half
        assert numbers.max() > 0.9999 * half and numbers.min() < -0.9999 * half
        # No number is likelier, by how random_ folds 2^32 into the width, than the theorem for sqrt(3) sigma allows
        assert math.ceil(2**32 / (2 * half)) / 2**32 <= s / (2 * WIDTH * sigma)


def test_sums_stay_where_they_are_exact():
    """The largest number that float32 uniforms can give, sqrt(2 ln 2^33) sigma on a GPU, and double precision's."""
    for sigma in (0.1, 0.25, 0.5, 1.0, 2.0):
        for dtype, bits in ((torch.float32, 33), (torch.float64, 64)):
            reach = 1 + sigma * math.sqrt(2 * bits * math.log(2))
            assert reach / grid(sigma, dtype) <= 2 / torch.finfo(dtype).eps


# ---- networks that look at low bits


class Low(nn.Module):
    """Logit 0: the share of pixels that hold bits below 2^-28, found by float32 additions; logit 1: a threshold.

    In exact arithmetic (z + c) - c - z is 0, and the network constant.
    """

    def __init__(self, threshold=0.0):
        super().__init__()
        self.threshold = threshold

    def forward(self, z):
        c = 1.5 * 2**-5
        share = (((z + c) - c) - z != 0).float().flatten(1).mean(1)
        return torch.stack([share, torch.full_like(share, self.threshold)], 1)


class Marked(nn.Module):
    """Class 0 where more pixels than a threshold lie on marked points of the grid, told by their whole numbers."""

    def __init__(self, marked, threshold, spacing):
        super().__init__()
        self.marked, self.threshold, self.spacing = marked, threshold, spacing

    def forward(self, z):
        share = self.marked((z / self.spacing).long()).float().flatten(1).mean(1)
        return torch.stack([share, torch.full_like(share, self.threshold)], 1)


def contradict(classifier, x, other, norm):
    """Whether two balls with different classes overlap, at two inputs."""
    one, two = (classifier.certify(z, n0=100, n=1000, alpha=1e-3)[0] for z in (x, other))
    differ = None not in (one.prediction, two.prediction) and one.prediction != two.prediction
    return differ and one.radius + two.radius > torch.linalg.vector_norm(x - other, norm).item()


def test_a_network_that_reads_low_bits_does_not_make_certificates_contradict_each_other():
    """Plain float32 sums hold low bits near a black pixel and none near a grey one; on the grid there are none."""
    model, x = Low().eval(), torch.zeros(1, *SHAPE)
    other = torch.full_like(x, 0.02)
    noise = 0.25 * torch.randn(1000, *SHAPE, generator=torch.Generator().manual_seed(0))
    dark, grey = (model(z + noise)[:, 0].mean().item() for z in (x, other))
    assert dark - grey > 0.005  # the leak is there
    model.threshold = (dark + grey) / 2
    for shared in (False, True):
        assert not contradict(SmoothedClassifier(model, 2, 0.25, shared_noise=shared), x, other, 2)


def test_which_multiples_are_even_does_not_show():
    """Rounded to the nearest, ties to even, 51.8 % of the noise would be even: a move by one spacing would be seen."""
    s = grid(0.25, torch.float32)
    noise = drawn("gaussian", 0.25, shape=(1000,))
    even = (noise / s).long().remainder(2).eq(0).double().mean().item()
    assert even == pytest.approx(0.5, abs=0.002)
    x = torch.zeros(1, *SHAPE)
    model = Marked(lambda numbers: numbers.remainder(2) == 0, 0.5, s).eval()
    assert not contradict(SmoothedClassifier(model, 2, 0.25), x, x + s, 2)


def test_which_points_uniform_noise_prefers_does_not_show():
    """torch's uniform_ knows 2^24 numbers, 9 or 10 between two points of the grid, whatever it is rounded to."""
    s, width = grid(0.25, torch.float32), WIDTH * 0.25
    single = torch.tensor(width).double()
    every = (torch.arange(2**24, dtype=torch.float64) / 2**24 * 2 * single - single).float()
    half = int(width / s) + 2
    held = torch.bincount((every / s).floor().long() + half, minlength=2 * half)
    marked = held == 10

    def lookup(numbers):
        return marked[(numbers + half).clamp(0, 2 * half - 1)]

    plain = torch.empty(1000, 784).uniform_(-width, width, generator=torch.Generator().manual_seed(0))
    plain = (plain / s).floor().long()
    here, moved = (lookup(plain + by).float().mean().item() for by in (0, 1))
    assert here - moved > 0.01  # the leak is there
    x = torch.zeros(1, *SHAPE)
    model = Marked(lookup, (here + moved) / 2, s).eval()
    assert not contradict(SmoothedClassifier(model, 2, 0.25, "uniform"), x, x + s, 1)
    ours = (drawn("uniform", 0.25, shape=(784,)) / s).long()
    here, moved = (lookup(ours + by).float().mean().item() for by in (0, 1))
    assert abs(here - moved) < 0.003


# ---- certificates


@pytest.mark.parametrize("kind", list(FILLS))
def test_radii_are_smaller_by_the_slack(kind):
    x, _ = images(4)
    classifier = SmoothedClassifier(tiny_conv(), CLASSES, 0.3, kind)
    slack = {"gaussian": 8, "uniform": 64}[kind] * 2.0**-21  # 1 + 2.4 <= 2^2
    found = classifier.certify(x, n0=50, n=500)
    for c in found:
        bound = lower_confidence_bound(c.counts[int(np.argmax(c.selection))], 500, 0.001)
        assert c.p_lower == bound and c.radius == max(certified_radius(bound, 0.3, kind) - slack, 0.0)
        assert (c.prediction is None) == (c.radius == 0.0)
    assert any(c.radius > 0 for c in found)


def test_what_the_slack_leaves_nothing_of_abstains():
    """In half precision the grid is coarse: 1/32 at sigma 0.25, and 0.875 off a radius of 28x28."""
    x = torch.full((1, *SHAPE), 0.75, dtype=torch.bfloat16)
    model = Marked(lambda numbers: numbers > 0, 0.5, grid(0.25, torch.bfloat16)).eval()
    (found,) = SmoothedClassifier(model, 2, 0.25).certify(x, n=1000)
    assert found.p_lower > 0.99 and found.prediction is None and found.radius == 0.0


def test_the_network_sees_inputs_and_noise_on_the_grid_alone():
    seen, s = [], grid(0.25, torch.float32)

    class Watch(nn.Module):
        def forward(self, z):
            seen.append(z.clone())
            return torch.stack([z.flatten(1).sum(1), -z.flatten(1).sum(1)], 1)

    x = torch.rand(2, *SHAPE)
    for shared in (False, True):
        classifier = SmoothedClassifier(Watch().eval(), 2, 0.25, shared_noise=shared)
        seen.clear()
        classifier.certify(x, n0=100, n=200, batch_size=100)
        classifier.predict(x, n=100)
        noisy = [z for z in seen if isinstance(z, torch.Tensor) and len(z) == 100]  # it is traced too
        assert len(noisy) == 2 * 4 and all(((z / s).frac() == 0).all() for z in noisy), shared


def test_a_rule_is_asked_about_radii_without_their_slack(monkeypatch):
    asked = []
    enough = Stopping.enough

    def watch(self, *args, slack=0.0):
        asked.append(slack)
        return enough(self, *args, slack=slack)

    monkeypatch.setattr(Stopping, "enough", watch)
    x, _ = images(2)
    SmoothedClassifier(tiny_conv(), CLASSES, 0.3).certify(x, n0=20, n=300, stopping=Stopping(radii=(0.1,)))
    assert asked and set(asked) == {8 * 2.0**-21}
