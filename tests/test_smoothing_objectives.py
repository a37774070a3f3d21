"""Objectives for randomized smoothing: losses by hand, the noise they see, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.errors import InputError
from certprune.masks import score_parameters, sparsify
from certprune.objectives import build_objective
from certprune.objectives.smoothadv import SoftSmoothed
from certprune.objectives.smoothing import (
    divergence,
    gaussian_noise,
    logits_of_copies,
    smoothed_log_probabilities,
)

from .nets import NETS, images

SIGMA = 0.25
EACH = {
    "gaussian": {"samples": 2},
    "stability": {},
    "consistency": {},
    "smoothadv": {"attack_eps": 0.5, "steps": 2},
}


def objective(name, **changes):
    return build_objective({"name": name, "sigma": SIGMA, **EACH[name], **changes})


class Recorder(nn.Module):
    """Keeps the batches that it is shown, and in which mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.batches, self.modes = model, [], []

    def forward(self, x):
        self.batches.append(x.detach().clone())
        self.modes.append(self.model.training)
        return self.model(x)


def linear():
    """Two classes, four pixels; the logits are (pixel 0, pixel 1)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    return model


def test_the_divergence_of_a_linear_model_by_hand():
    model = linear()
    noise = torch.zeros(2, 1, 1, 2, 2)
    noise[0, 0, 0, 0, 0], noise[1, 0, 0, 0, 1] = math.log(3), math.log(4)
    logits = logits_of_copies(model, torch.full((1, 1, 2, 2), 0.5), noise)  # odds 3:1 and 1:4
    p, q = F.log_softmax(logits, 2), smoothed_log_probabilities(logits)
    assert torch.allclose(p.exp(), torch.tensor([[[0.75, 0.25]], [[0.2, 0.8]]]))
    assert torch.allclose(q.exp(), torch.tensor([[0.475, 0.525]]))
    by_hand = 0.475 * math.log(0.475 / 0.75) + 0.525 * math.log(0.525 / 0.25)  # KL(q || p), q first
    by_hand += 0.475 * math.log(0.475 / 0.2) + 0.525 * math.log(0.525 / 0.8)
    assert divergence(q, p).item() == pytest.approx(by_hand / 2, rel=1e-5)


def fixed_logits(model, x, samples):
    """What the objectives compute in validation, whose noise is fixed: (samples, batch, classes)."""
    with torch.no_grad():
        return logits_of_copies(model, x, gaussian_noise(x, SIGMA, samples))


def test_each_loss_is_made_of_its_terms():
    """Spelt out in probabilities, over the noise that validation draws."""
    model = NETS["conv"](seed=2)
    x, y = images(8, seed=2)
    copies = fixed_logits(model, x, 3)
    p = copies.softmax(2)
    q = p.mean(0)
    clean = model(x).softmax(1).detach()
    noisy = fixed_logits(model, x, 1)[0].softmax(1)
    rows = torch.arange(8)
    cross = sum(-part[rows, y].log().mean() for part in p) / 3
    apart = sum((q * (q / part).log()).sum(1).mean() for part in p) / 3
    doubt = -(q * q.log()).sum(1).mean()
    stability = -clean[rows, y].log().mean() + 3.0 * (clean * (clean / noisy).log()).sum(1).mean()

    def value(name, **changes):
        with torch.no_grad():
            return objective(name, **changes)(model, x, y, 1.0)[0]

    assert torch.allclose(value("gaussian", samples=3), cross)
    assert torch.allclose(value("stability", beta=3.0), stability)
    consistency = value("consistency", samples=3, weight=7.0, entropy=0.25)
    assert torch.allclose(consistency, cross + 7.0 * apart + 0.25 * doubt)


@pytest.mark.parametrize("name", EACH)
def test_without_noise_only_the_cross_entropy_is_left(name):
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)
    settings = {"consistency": {"entropy": 0.0}, "smoothadv": {"attack_eps": 0.0}}.get(name, {})
    loss, figures = objective(name, **{**EACH[name], **settings, "sigma": 0.0})(model, x, y, 1.0)
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    for key in ("stability_loss", "consistency_loss"):
        assert figures.get(key, torch.tensor(0.0)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("consistency", {"weight": 0.0, "entropy": 0.0}), ("smoothadv", {"attack_eps": 0.0}), ("smoothadv", {"steps": 0})],
)
def test_without_its_extra_terms_each_is_gaussian_over_the_same_noise(name, settings):
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)
    losses = []
    for one, changes in ((name, settings), ("gaussian", {})):
        torch.manual_seed(5)
        losses.append(objective(one, samples=2, **changes)(model, x, y, 1.0)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", EACH)
def test_noise_is_in_pixels_and_unclipped(name):
    model = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    x, y = images(200, seed=1)
    x = x.round()  # black and white: a clip would cut half of the noise
    objective(name, sigma=0.5, **({"attack_eps": 0.0} if name == "smoothadv" else {}))(model, x, y, 1.0)
    noisy = model.batches[-1]
    noise = noisy - x.repeat(len(noisy) // len(x), 1, 1, 1)
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and abs(noise.mean().item()) < 0.02
    assert noisy.min() < -1 and noisy.max() > 2
    if len(noisy) > len(x):
        assert not torch.equal(noise[: len(x)], noise[len(x) : 2 * len(x)])


@pytest.mark.parametrize("name", EACH)
def test_noise_is_fixed_in_validation_and_fresh_in_training(name):
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)

    def loss():
        return objective(name)(model, x, y, 1.0)[0].item()

    with torch.no_grad():
        state = torch.get_rng_state()
        fixed = loss()
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert loss() == fixed
    torch.manual_seed(1)
    first, second = loss(), loss()
    torch.manual_seed(1)
    assert loss() == first != second


@pytest.mark.parametrize("name", EACH)
def test_scores_get_the_gradient_of_their_effective_weights(name):
    model = NETS["conv"](seed=1, dtype=torch.float64)
    x, y = images(8, seed=1, dtype=torch.float64)
    # Weighted so that each term counts; and a large attack would move with the weight, which the gradient leaves out.
    terms = {"stability": {"beta": 1e3}, "consistency": {"weight": 1e3}, "smoothadv": {"attack_eps": 0.01}}
    tested = objective(name, **terms.get(name, {}))
    sparsify(model, sparsity=0.5)
    model[0].parametrizations.weight.original.requires_grad_(False)  # as the prune stage freezes them
    torch.manual_seed(1)
    tested(model, x, y, 1.0)[0].backward()
    gradients = [scores.grad for scores in score_parameters(model)]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    # Straight-through: d loss / d scores = w * d loss / d effective weight, here by a difference along one weight.
    mask = model[0].parametrizations.weight[0]
    place = (mask.scores.grad.abs() * mask.mask).argmax()
    original = model[0].parametrizations.weight.original.data.view(-1)
    weight, step, losses = original[place].item(), 1e-4, []
    for sign in (1, -1):
        original[place] = weight * (1 + sign * step)
        torch.manual_seed(1)
        losses.append(tested(model, x, y, 1.0)[0].item())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(mask.scores.grad.view(-1)[place].item(), rel=0.01)


def prune_mode(model):
    """Train mode but for batch normalisation."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, prune_mode], ids=["train", "eval", "prune"])
def test_modes_stay_and_statistics_move_in_training_alone(name, mode):
    model = NETS["bn"](seed=1)
    mode(model)
    x, y = images(16, seed=1)
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective(name)(model, x, y, 1.0)[0].backward()
    assert [module.training for module in model.modules()] == modes
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    expected = {key for key in before if "running" in key or "tracked" in key}
    assert moved == (expected if mode is nn.Module.train else set())
    passes = model[1].num_batches_tracked - before["1.num_batches_tracked"]
    assert passes.item() == ((2 if name == "stability" else 1) if mode is nn.Module.train else 0)


def test_batch_statistics_are_those_of_the_noisy_copies():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=1.0), nn.Linear(64, 10)).train()
    x, y = images(200, seed=1)
    objective("gaussian", sigma=2.0)(model, x, y, 1.0)
    assert model[1].running_var.mean().item() == pytest.approx(2.0**2 + 1 / 12, rel=0.05)


def test_smoothadv_attacks_what_it_trains_on():
    """The same noise in every step and in training, in eval mode; delta in the l2 ball and x + delta in [0, 1]."""
    inner = NETS["bn"](seed=1).train()
    model = Recorder(inner)
    x, y = images(8, seed=1)
    x[:, :, 0] = 1.0  # on the edge of the pixel range
    torch.manual_seed(3)
    objective("smoothadv", samples=3, attack_eps=0.8, steps=4)(model, x, y, 1.0)[0].backward()
    torch.manual_seed(3)
    noise = gaussian_noise(x, SIGMA, 3).flatten(0, 1)
    assert model.modes == [False] * 4 + [True] and inner.training
    deltas = [(batch - noise - x.repeat(3, 1, 1, 1)).unflatten(0, (3, 8)) for batch in model.batches]
    assert deltas[0].abs().max() < 1e-6  # begins at the image
    for delta in deltas:
        assert torch.allclose(delta[0], delta[1], atol=1e-6) and torch.allclose(delta[0], delta[2], atol=1e-6)
        assert delta[0].flatten(1).norm(dim=1).max() <= 0.8 + 1e-5
        assert (x + delta[0]).min() > -1e-6 and (x + delta[0]).max() < 1 + 1e-6
    assert deltas[1][0].flatten(1).norm(dim=1).max().item() == pytest.approx(0.4, abs=0.1)  # a step: 2 eps / steps
    assert deltas[-1][0].flatten(1).norm(dim=1).min() > 0.5


def test_the_attack_of_a_linear_model_climbs_the_smoothed_loss():
    """Two classes: every copy's margin falls fastest along the same direction, so the ball's far end is the worst."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    row = model[1].weight[1] - model[1].weight[0]
    x, y = images(6)
    x, y = 0.4 + 0.2 * x, y % 2
    worst = x + (0.3 * (1 - 2 * y)[:, None] * row / row.norm()).view_as(x)
    torch.manual_seed(1)
    loss, figures = objective("smoothadv", attack_eps=0.3, steps=4)(model, x, y, 1.0)
    torch.manual_seed(1)
    noise = gaussian_noise(x, SIGMA, 2)
    expected = F.cross_entropy(logits_of_copies(model, worst, noise).flatten(0, 1), y.repeat(2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert figures["attack_eps"].item() == pytest.approx(0.3)
    soft = F.cross_entropy(SoftSmoothed(model, noise)(x), y)  # its cross-entropy is that of the mean probabilities
    probabilities = logits_of_copies(model, x, noise).softmax(2).mean(0)
    assert soft.item() == pytest.approx(-probabilities[torch.arange(6), y].log().mean().item(), rel=1e-5)


def test_attack_eps_follows_its_ramp_if_there_is_one():
    model = NETS["mlp"]()
    x, y = images(4)
    eps = [objective("smoothadv", ramp=r)(model, x, y, 0.25)[1]["attack_eps"].item() for r in ({"end": 0.0}, {})]
    assert eps[0] == 0.5 and 0 < eps[1] < 0.5
    assert objective("smoothadv").ramp(0.0) == 1.0


@pytest.mark.parametrize("name", EACH)
def test_figures(name):
    model = NETS["conv"](seed=1)
    x, y = images(32, seed=1)
    common = {"noisy_accuracy", "noisy_loss", "sigma"}
    extra = {
        "stability": {"clean_loss", "clean_accuracy", "stability_loss"},
        "consistency": {"consistency_loss", "entropy"},
        "smoothadv": {"attack_accuracy", "attack_eps"},
    }.get(name, set())
    _, training = objective(name)(model, x, y, 1.0)
    assert training.keys() == (common | extra if name != "smoothadv" else extra | {"sigma"})
    with torch.no_grad():
        _, figures = objective(name)(model, x, y, 1.0)
    assert figures.keys() == common | extra | {"clean_loss", "clean_accuracy"}
    logits = fixed_logits(model, x, 1 if name == "stability" else 2)
    right = sum((part.argmax(1) == y).sum().item() for part in logits)
    assert figures["noisy_accuracy"].item() == pytest.approx(right / (len(logits) * 32))
    assert figures["sigma"].item() == SIGMA
    assert figures["clean_accuracy"].item() == (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "gaussian"}, "'sigma' is missing"),
        ({"name": "gaussian", "sigma": -0.1}, "'sigma' is -0.1"),
        ({"name": "gaussian", "sigma": 0.25, "samples": 0}, "'samples' is 0"),
        ({"name": "stability", "sigma": 0.25, "eps": 0.1}, "unknown key 'eps'"),
        ({"name": "consistency", "sigma": 0.25, "samples": 1}, "'samples' is 1"),
        ({"name": "smoothadv", "sigma": 0.25}, "'attack_eps' is missing"),
        ({"name": "smoothadv", "sigma": float("nan"), "attack_eps": 1.0}, "sigma"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        build_objective(settings)
