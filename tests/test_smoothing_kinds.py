"""Uniform noise and its l1 radii, what radii imply in other norms, and noise that all inputs share."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from certifiers.errors import InputError
from certifiers.smoothing import (
    SmoothedClassifier,
    SmoothedLedger,
    Stopping,
    certified_radius,
    certify_smoothed,
    implied_radius,
    read_smoothed_ledger,
    smoothing_header,
)
from certifiers.smoothing.kinds import KINDS, WIDTH
from certifiers.smoothing.noise import BLOCK, fill_uniform, grid, snapped, stream
from certifiers.smoothing.sampling import fastest_batch
from certifiers.smoothing.shared import shared_counts, split_first_layer
from certifiers.verdict import model_hash
from tests.nets import CLASSES, NETS, SHAPE, HalfSpace, images, tiny_conv

CPU = torch.device("cpu")


class Axis(nn.Module):
    """Class 1 where the first pixel is above a half. Under uniform noise of half-width w its probability is exactly
    1/2 + distance / 2w, so that the true l1 radius, the distance, is what the theorem gives: it cannot be larger."""

    def forward(self, x):
        return torch.stack([torch.full_like(x[:, 0], 0.5), x[:, 0]], 1)


# ---- the radius


def test_uniform_radius_by_hand():
    sigma = 1 / WIDTH  # half-width 1
    assert certified_radius(0.75, sigma, "uniform") == pytest.approx(0.5)  # 2 * 1 * (0.75 - 0.5)
    assert certified_radius(1.0, sigma, "uniform") == pytest.approx(1.0)
    assert certified_radius(0.5, sigma, "uniform") == certified_radius(0.2, sigma, "uniform") == 0.0
    for kind in KINDS.values():
        p = np.linspace(0.5, 0.999, 50)
        assert np.allclose(kind.probability(kind.radius(p)), p)
    with pytest.raises(InputError, match="gaussian or uniform"):
        certified_radius(0.9, 1.0, "laplace")


def test_moved_cubes_share_at_least_what_the_theorem_says():
    """The proof's one inequality, for random moves: the volume shared by cubes, exactly and by sampled points."""
    rng = np.random.default_rng(0)
    for dimension in (1, 2, 5, 20):
        for _ in range(50):
            d = rng.laplace(size=dimension) * rng.choice([0.01, 0.1, 0.5])
            shared = np.prod(np.maximum(1 - abs(d) / 2, 0))  # half-width 1
            assert shared >= 1 - abs(d).sum() / 2 - 1e-12
    d = np.array([0.3, -0.2])
    inside = (abs(rng.uniform(-1, 1, (200_000, 2)) + d) <= 1).all(1).mean()
    assert inside == pytest.approx(np.prod(1 - abs(d) / 2), abs=0.005)


def test_the_closed_form_of_an_axis_is_reached_and_never_passed():
    sigma = 0.25
    distances = np.linspace(0.02, 0.4, 12)
    x = torch.full((12, 7), 0.5)
    x[:, 0] += torch.tensor(distances, dtype=torch.float32)
    classifier = SmoothedClassifier(Axis().eval(), 2, sigma, "uniform")
    found = classifier.certify(x, n0=2000, n=20_000, alpha=1e-5)
    for certificate, distance in zip(found, distances, strict=True):
        assert certificate.norm == "l1" and certificate.radius <= distance + 1e-6
        assert certificate.counts[1] / 20_000 == pytest.approx(0.5 + distance / (2 * WIDTH * sigma), abs=0.02)
        if certificate.prediction is None:
            assert distance < 0.03
        else:
            assert certificate.prediction == 1 and certificate.radius > distance - 0.02
    assert "within l1 radius 0." in str(found[-1])
    # Along the axis the radius is exact: beyond it the class does change.
    moved = x[-1:].clone()
    moved[0, 0] -= 1.02 * distances[-1]
    assert classifier.predict(moved, n=100_000) == [0]


def test_no_l1_attack_within_the_radius_changes_a_half_space():
    """The worst l1 move puts everything into the largest weight; the truth is found by fresh samples."""
    model, sigma = HalfSpace(), 0.25
    x = model.at([0.1, 0.2, 0.3])
    classifier = SmoothedClassifier(model, 2, sigma, "uniform")
    for row, certificate in zip(x, classifier.certify(x, n=20_000, alpha=1e-4), strict=True):
        worst = model.w.abs().argmax()
        point = row.clone()
        point[worst] -= 0.999 * certificate.radius * model.w[worst].sign()
        noise = torch.empty(200_000, 6).uniform_(
            -WIDTH * sigma, WIDTH * sigma, generator=torch.Generator().manual_seed(1)
        )
        assert certificate.radius > 0 and (model(point + noise).argmax(1) == 1).float().mean() > 0.5


def test_uniform_noise_is_uniform_with_standard_deviation_sigma():
    whole = torch.empty(2 * BLOCK, 300)
    fill_uniform(whole, 0.5, stream(0, 1, "estimate", CPU))
    assert whole.abs().max() <= WIDTH * 0.5 * 1.001 and whole.std().item() == pytest.approx(0.5, rel=0.01)
    assert stats.kstest(whole.flatten()[:20_000].numpy(), "uniform", args=(-WIDTH / 2, WIDTH)).pvalue > 1e-4
    again = torch.empty(2 * BLOCK, 300)
    generator = stream(0, 1, "estimate", CPU)
    for part in again.split(BLOCK):
        fill_uniform(part, 0.5, generator)
    assert torch.equal(again, whole)


def test_implied_radii_by_hand_and_by_points():
    assert implied_radius(0.5, "l2", "linf", 784) == pytest.approx(0.5 / 28)
    assert implied_radius(0.5, "l1", "linf", 100) == pytest.approx(0.005)
    assert implied_radius(0.5, "l1", "l2", 100) == pytest.approx(0.05)
    for same in (("l2", "l2"), ("l2", "l1"), ("linf", "l2"), ("linf", "l1")):
        assert implied_radius(0.5, *same, 100) == 0.5
    norms = {"l1": 1, "l2": 2, "linf": math.inf}
    rng = np.random.default_rng(0)
    for norm, p in norms.items():
        for target, q in norms.items():
            radius = implied_radius(1.0, norm, target, 9)
            points = [*rng.normal(size=(200, 9)), np.ones(9), np.eye(9)[0]]
            reach = [np.linalg.norm(radius * d / np.linalg.norm(d, q), p) for d in points]
            assert max(reach) == pytest.approx(1.0, rel=1e-9)  # inside, and no larger ball is
    for bad in ((0.5, "l3", "l2", 4), (0.5, "l2", "l0", 4), (-1.0, "l2", "l1", 4), (0.5, "l2", "linf", 0)):
        with pytest.raises(InputError):
            implied_radius(*bad)


# ---- shared noise


@pytest.mark.parametrize("name", NETS)
def test_a_split_network_is_the_network(name):
    model = NETS[name](dtype=torch.float64)
    x, _ = images(5, dtype=torch.float64)
    noise = torch.randn(7, *SHAPE, dtype=torch.float64)
    split = split_first_layer(model, x)
    assert split.tail is not model
    with torch.no_grad():
        assert torch.allclose(split.tail(split.linear(noise) + split.head(x)[2]), model(x[2] + noise), atol=1e-12)


def test_what_cannot_be_split_is_run_whole():
    class Skip(nn.Module):  # the input is needed behind the first layer too
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.fc(x)) + x

    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    for model in (Skip(), Branches(), HalfSpace()):
        split = split_first_layer(model.eval(), torch.rand(3, 6 if isinstance(model, HalfSpace) else 4))
        assert split.tail is model and torch.equal(split.head(torch.ones(2)), torch.ones(2))


def test_a_network_that_changed_since_it_was_traced_is_not_split_as_it_was():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.sign = nn.Linear(4, 2), [1.0]

        def forward(self, x):
            return self.sign[0] * self.fc(x)

    model, x = Signed().eval(), torch.rand(3, 4)
    shared = SmoothedClassifier(model, 2, 0.1, shared_noise=True)
    before = [found.prediction for found in shared.certify(x, 50, 200)]
    model.sign[0] = -1.0
    after = [found.prediction for found in shared.certify(x, 50, 200)]
    assert after == [found.prediction for found in SmoothedClassifier(model, 2, 0.1).certify(x, 50, 200)] != before


@pytest.mark.parametrize("noise", list(KINDS))
def test_shared_noise_counts_as_plain_sampling_does(noise):
    """The same draws, counted by the model as it stands; and inputs do get the same ones."""
    x, _ = images(4)
    model = tiny_conv()
    classifier = SmoothedClassifier(model, CLASSES, 0.3, noise, shared_noise=True)
    found = classifier.certify(x, n0=50, n=1030, seed=3)
    drawn = torch.empty(1100, *SHAPE)
    classifier._fill(3, "shared", "estimate", CPU)(drawn)
    with torch.no_grad():
        for row, certificate in zip(x, found, strict=True):
            row = snapped(row, grid(0.3, row.dtype))
            plain = model(row + drawn[:1030]).argmax(1).bincount(minlength=CLASSES)
            assert abs(plain - torch.tensor(certificate.counts)).sum() <= 2  # a tie up to rounding may be another's
    twice = classifier.certify(x[[1, 1]], n0=50, n=1030, seed=3, indices=[1, 77])
    assert twice[0] == twice[1] == found[1]
    own = SmoothedClassifier(model, CLASSES, 0.3, noise).certify(x[[1, 1]], n0=50, n=1030, seed=3, indices=[1, 77])
    assert (own[0].selection, own[0].counts) != (own[1].selection, own[1].counts)
    assert classifier.predict(x, n=1000) == [
        int(np.argmax(c.counts)) if c.prediction is not None else None for c in found
    ]


def test_shared_noise_does_not_depend_on_groups_batches_or_resumption(tmp_path, monkeypatch):
    x, y = images(7)
    model = tiny_conv()
    classifier = SmoothedClassifier(model, CLASSES, 0.3, shared_noise=True)
    rule = Stopping(tolerance=0.1)
    settings = {"n0": 20, "n": 1500, "alpha": 0.05, "seed": 1, "stopping": rule}
    whole = classifier.certify(x, 20, 1500, 0.05, seed=1, stopping=rule)
    assert len({c.samples for c in whole}) > 1
    monkeypatch.setattr("certifiers.smoothing.certification.GROUP", 3)
    header = {"model": model_hash(model), "sigma": 0.3, "n0": 20, "n": 1500, "alpha": 0.05, "seed": 1}
    header |= smoothing_header(classifier, rule, x)
    with SmoothedLedger(tmp_path / "a.jsonl", header) as ledger:
        rows = [4, 1]
        certify_smoothed(classifier, x[rows], y[rows], indices=rows, ledger=ledger, batch_size=300, **settings)
        seen = []
        found = certify_smoothed(
            classifier, x, y, ledger=ledger, on_input=lambda done, n: seen.append((done, n)), **settings
        )
    assert seen == [(5, 7), (7, 7)]
    assert [(v.counts, v.samples, v.radius) for v in found] == [(c.counts, c.samples, c.radius) for c in whole]
    assert [v.index for v in read_smoothed_ledger(tmp_path / "a.jsonl")[1]] == [4, 1, 0, 2, 3, 5, 6]


def test_shared_counts_by_hand():
    x = torch.tensor([[0.5], [-0.5], [2.0]])
    seen = []

    def fill(out):  # 0, 1, 2, ... in every sample that is drawn
        out[:, 0] = torch.arange(len(seen), len(seen) + len(out)) % 2 * 2.0 - 1.0
        seen.extend(out[:, 0].tolist())

    class Sign(nn.Module):
        def forward(self, x):
            return torch.cat([-x, x], 1)

    split = split_first_layer(Sign().eval(), torch.rand(3, 1))
    counts, samples = shared_counts(split, x, fill, [100, 200, 250], 2, 100, lambda c, n, rows: (rows == 1).tolist())
    assert counts.tolist() == [[125, 125], [50, 50], [0, 250]] and samples == [250, 100, 250]
    assert len(seen) == 300  # whole blocks
    with pytest.raises(InputError, match="NaN or infinite"):
        shared_counts(split, x * math.inf, fill, [100], 2, 100)


def test_the_batch_size_that_is_found(monkeypatch):
    x, seen = torch.zeros(1, 8, 8), []

    def time_of(costs):
        def took(model, batch):
            assert batch.shape[1:] == x.shape
            seen.append(len(batch))
            model(batch)
            return costs.get(len(batch), 9.0) * len(batch)

        return took

    costs = {100: 1.0, 200: 0.8, 400: 0.79, 800: 0.5, 1600: 2.0}  # seconds a sample
    monkeypatch.setattr("certifiers.smoothing.sampling._time", time_of(costs))
    assert fastest_batch(torch.flatten, x, 10**6, seconds=60.0) == 800 and max(seen) == 1600  # far slower: no further
    assert fastest_batch(torch.flatten, x, 450, seconds=60.0) == 200  # 400 is not worth it, more are not wanted
    assert fastest_batch(torch.flatten, x, 10, seconds=60.0) == 100
    assert fastest_batch(torch.flatten, x, 10**6, seconds=0.0) == 100

    def no_memory(batch):
        if len(batch) > 400:
            raise torch.OutOfMemoryError
        return torch.zeros(len(batch), 3)

    assert fastest_batch(no_memory, x, 10**6, seconds=60.0) == 200


# ---- the ledger


def test_ledgers_of_other_noise_or_rules_are_refused(tmp_path):
    x, y = images(2)
    model = tiny_conv()
    plain = SmoothedClassifier(model, CLASSES, 0.3)
    assert smoothing_header(plain, None, x) == {"norm": "l2", "slack": 8 * grid(0.3, torch.float32)}
    header = {"model": model_hash(model), "sigma": 0.3, "n0": 10, "n": 60, "alpha": 0.05, "seed": 0}
    ask = {"n0": 10, "n": 60, "alpha": 0.05}
    rule = Stopping(radii=(0.5,))
    others = [
        (SmoothedClassifier(model, CLASSES, 0.3, "uniform"), None, "norm"),
        (SmoothedClassifier(model, CLASSES, 0.3, shared_noise=True), None, "shared_noise"),
        (plain, rule, "stopping"),
    ]
    path = tmp_path / "plain.jsonl"
    with SmoothedLedger(path, header | smoothing_header(plain, None, x)) as ledger:
        certify_smoothed(plain, x, y, ledger=ledger, **ask)
        for other, stopping, key in others:
            with pytest.raises(InputError, match=key):
                certify_smoothed(other, x, y, ledger=ledger, stopping=stopping, **ask)
    content = path.read_bytes()
    for place, (other, stopping, key) in enumerate(others):
        with pytest.raises(InputError, match=f"another {key}"):
            SmoothedLedger(path, header | smoothing_header(other, stopping, x))
        with SmoothedLedger(tmp_path / f"{place}.jsonl", header | smoothing_header(other, stopping, x)) as ledger:
            found = certify_smoothed(other, x, y, ledger=ledger, stopping=stopping, **ask)
            assert ledger.verdicts == found
            with pytest.raises(InputError, match="is for"):
                certify_smoothed(plain, x, y, ledger=ledger, **ask)
    assert path.read_bytes() == content
    written = json.loads((tmp_path / "2.jsonl").read_text().splitlines()[0])["stopping"]
    assert written["radii"] == [0.5] and written["bound"] == "betting" and written["block"] == BLOCK


def test_a_ledger_from_before_samples_were_written_is_gone_on_with(tmp_path):
    x, y = images(3)
    model = tiny_conv()
    classifier = SmoothedClassifier(model, CLASSES, 0.3)
    header = {"model": model_hash(model), "sigma": 0.3, "n0": 10, "n": 60, "alpha": 0.05, "seed": 0}
    header |= smoothing_header(classifier, None, x)
    path = tmp_path / "old.jsonl"
    with SmoothedLedger(path, header) as ledger:
        certify_smoothed(classifier, x[:2], y[:2], n0=10, n=60, alpha=0.05, ledger=ledger)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        assert line.pop("samples") == 60
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with SmoothedLedger(path, header) as ledger:
        found = certify_smoothed(classifier, x, y, n0=10, n=60, alpha=0.05, ledger=ledger)
    assert [v.samples for v in found] == [None, None, 60]
