"""Adversarial objectives: losses that are known by hand, and what a step leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall, threat
from certprune.masks import score_parameters, sparsify, weight_parameters
from certprune.objectives import build_objective
from certprune.objectives.free import into_ball
from certprune.objectives.trades import divergence

from .linear_nets import dual_norm, inner_images, linear, margins, mixed, worst_loss
from .nets import NETS, images

NAMES = ("adversarial", "trades", "free")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack_mode", ["train", "eval"])
def test_the_adversarial_loss_of_a_linear_model_is_exact(norm, attack_mode):
    model = linear()
    x, y = inner_images()
    settings = {"name": "adversarial", "eps": 0.1, "norm": norm, "steps": 40, "attack_mode": attack_mode}
    settings["step_size"] = 0.1  # whole radii: from its random start l2 turns to the worst direction quickly
    for ramp, progress, share in (({}, 0.0, 1.0), ({"end": 0.5, "shape": "linear"}, 0.25, 0.5)):
        ramp = {"ramp": ramp} if ramp else {}
        loss, figures = build_objective({**settings, **ramp})(model, x, y, progress)
        worst = worst_loss(model, x, y, norm, 0.1 * share)
        assert loss.item() == pytest.approx(worst.item(), rel=1e-4)
        broken = margins(model, x, y) - 0.1 * share * dual_norm(model, norm) < 0
        assert figures["attack_accuracy"].item() == pytest.approx(1 - broken.float().mean().item())
        assert figures["eps"].item() == pytest.approx(0.1 * share)
    with torch.no_grad():
        _, figures = build_objective(settings)(model, x, y, 1.0)
    assert figures["clean_loss"].item() == pytest.approx(F.cross_entropy(model(x), y).item())


def test_divergence_by_hand():
    # p = (3/4, 1/4) against q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
    p, q = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert divergence(q, p).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert divergence(p, q).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trades_of_a_linear_model_is_exact(norm):
    model = linear()
    x, y = inner_images(1)

    def loss(beta):
        return build_objective({"name": "trades", "eps": 0.1, "norm": norm, "beta": beta})(model, x, y, 1.0)

    clean = F.cross_entropy(model(x), y)
    assert loss(0.0)[0].item() == pytest.approx(clean.item())
    # The divergence grows along the rows' difference both ways; from next to x the attack takes the way it fell on.
    margin, shift = margins(model, x, y), 0.1 * dual_norm(model, norm)
    before = torch.stack((margin, torch.zeros(1)), 1)
    ends = [divergence(torch.stack((margin + way * shift, torch.zeros(1)), 1), before).item() for way in (1, -1)]
    found, figures = loss(3.0)
    apart = (found - clean).item() / 3.0
    assert min(abs(apart - end) for end in ends) < 1e-3 * min(ends)
    assert figures["divergence"].item() == pytest.approx(apart, rel=1e-4)
    assert figures["clean_accuracy"].item() == (model(x).argmax(1) == y).float().mean().item()


def test_trades_attacks_predictions_not_labels():
    model = NETS["conv"]()
    x, y = images(8)
    objective = build_objective({"name": "trades", "eps": 0.1})
    losses = []
    for labels in (y, (y + 1) % 10):
        torch.manual_seed(0)
        loss, figures = objective(model, x, labels, 1.0)
        losses.append(figures["divergence"].item())
        assert loss.item() == pytest.approx(F.cross_entropy(model(x), labels).item() + 6 * losses[-1], rel=1e-4)
    assert losses[0] == losses[1] > 0


def test_trades_is_differentiated_on_both_sides_of_the_divergence():
    """As in the paper's own code: not only are attacked predictions drawn to the clean ones."""
    model = NETS["conv"]()
    x, y = images(8)
    objective = build_objective({"name": "trades", "eps": 0.1})
    torch.manual_seed(0)
    attacked = objective.attack(model, x, 0.1)
    torch.manual_seed(0)
    objective(model, x, y, 1.0)[0].backward()
    clean, logits = model(x).log_softmax(1), model(attacked).log_softmax(1)
    loss = F.nll_loss(clean, y) + 6 * (clean.exp() * (clean - logits)).sum(1).mean()
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_steps_by_the_gradient_of_the_last_pass(norm):
    """Of a linear model one step of eps from 0 is the worst perturbation already."""
    model = linear()
    x, y = inner_images(4)
    y = torch.zeros_like(y)
    objective = build_objective({"name": "free", "eps": 0.1, "norm": norm})

    def step(images, labels):
        loss, _ = objective(model, images, labels, 1.0)
        loss.backward()
        return loss.item()

    assert step(x, y) == pytest.approx(F.cross_entropy(model(x), y).item())
    assert step(x, y) == pytest.approx(worst_loss(model, x, y, norm, 0.1).item(), rel=1e-5)
    # The perturbation goes on to the next minibatch: worst there, too, as the labels are the same.
    x, y = inner_images(4, seed=1)[0], y
    assert step(x, y) == pytest.approx(worst_loss(model, x, y, norm, 0.1).item(), rel=1e-5)
    # For the other labels it is the best that can be, eps the other way.
    assert step(x, 1 - y) == pytest.approx(worst_loss(model, x, 1 - y, norm, -0.1).item(), rel=1e-5)
    objective.begin_epoch()
    assert step(x, y) == pytest.approx(F.cross_entropy(model(x), y).item())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_never_carries_more_than_eps(norm):
    """Ten steps one way, then two the other way: were the perturbation longer than eps, it would not be turned."""
    model = linear()
    x, _ = inner_images(4)
    y = torch.zeros(4, dtype=torch.long)
    objective = build_objective({"name": "free", "eps": 0.1, "norm": norm, "step_size": 0.1})
    for labels in [y] * 10 + [1 - y] * 2:
        objective(model, x, labels, 1.0)[0].backward()
    loss, _ = objective(model, x, 1 - y, 1.0)
    assert loss.item() == pytest.approx(worst_loss(model, x, 1 - y, norm, 0.1).item(), rel=1e-5)


def test_free_needs_one_pass_a_step_and_trains_the_weights_by_it():
    model = NETS["conv"]().train()
    x, y = inner_images(8)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    objective = build_objective({"name": "free", "eps": 0.1, "step_size": 0.08})
    for _ in range(3):
        model.zero_grad()
        objective(model, x, y, 1.0)[0].backward()
    assert len(calls) == 3
    point = x
    for _ in range(2):  # the two steps before the third pass, by hand
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        point = x + (point - x + 0.08 * gradient.sign()).clamp(-0.1, 0.1)
    expected = torch.autograd.grad(F.cross_entropy(model(point.detach()), y), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_into_ball():
    delta = torch.tensor([[0.3, -0.4], [0.03, 0.04]]).view(2, 1, 1, 2)
    assert torch.allclose(into_ball(delta, LinfBall(0.35)), delta.clamp(-0.35, 0.35))
    expected = torch.tensor([[0.06, -0.08], [0.03, 0.04]]).view(2, 1, 1, 2)
    assert torch.allclose(into_ball(delta, L2Ball(torch.tensor(0.1))), expected)
    assert torch.equal(into_ball(delta, L2Ball(0.0)), torch.zeros_like(delta))


def statistics(model):
    """How many batches each batch normalisation has learnt from."""
    return [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]


@pytest.mark.parametrize(("name", "passes"), [("adversarial", 1), ("trades", 2), ("free", 1)])
def test_running_statistics_follow_the_passes_of_the_loss_alone(name, passes):
    objective = build_objective({"name": name, "eps": 0.05})
    x, y = images(8)
    model = NETS["bn"]().train()
    objective(model, x, y, 1.0)[0].backward()
    assert statistics(model) == [passes, passes] and all(module.training for module in model.modules())
    model = mixed(NETS["bn"]())
    modes = [module.training for module in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objective(model, x, y, 1.0)[0].backward()
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"name": "adversarial", "steps": 2, "attack_mode": "train"}, [True, True, True]),
        ({"name": "adversarial", "steps": 2, "attack_mode": "eval"}, [False, False, True]),
        ({"name": "trades", "steps": 2}, [False, False, False, True, True]),
        ({"name": "free"}, [True]),
    ],
)
def test_the_mode_of_each_pass(settings, modes):
    model = NETS["bn"]().train()
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    build_objective({"eps": 0.05, **settings})(model, *images(8), 1.0)
    assert seen == modes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_pass_of_an_objective_is_inside_the_threat_set(name, norm):
    model = NETS["conv"]().train()
    x, y = images(8)
    x = x.round()  # black and white: half of every direction leaves [0, 1]
    ball = threat(norm, 0.3)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    objective = build_objective({"name": name, "eps": 0.3, "norm": norm, "step_size": 0.4})
    for _ in range(4):
        objective(model, x, y, 1.0)[0].backward()
    assert all(ball.contains(x, point, tolerance=1e-7).all() for point in seen)
    assert (seen[-1] - x).flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_the_same_each_time_and_moves_nothing(name):
    model = NETS["bn"]()
    x, y = images(8)
    objective = build_objective({"name": name, "eps": 0.05})
    objective(model, x, y, 1.0)[0].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    carried = getattr(objective, "_carried", None)
    state = torch.get_rng_state()
    with torch.no_grad():
        (one, figures), (other, _) = (objective(model, x, y, 1.0) for _ in range(2))
    assert torch.equal(one, other) and not one.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert getattr(objective, "_carried", None) is carried
    assert figures.keys() >= {"clean_loss", "clean_accuracy", "attack_accuracy", "eps"}
    assert figures["clean_loss"].item() == pytest.approx(F.cross_entropy(model(x), y).item())
    assert one > figures["clean_loss"]  # it was attacked


@pytest.mark.parametrize("name", NAMES)
def test_scores_get_the_gradient_of_the_attacked_loss(name):
    masked, plain = sparsify(NETS["conv"](), 0.5), NETS["conv"]()
    for parameter in weight_parameters(masked):
        parameter.requires_grad_(False)
    with torch.no_grad():
        for layer, pruned in zip(plain, masked, strict=True):
            if hasattr(layer, "weight"):
                layer.weight.copy_(pruned.weight)
    x, y = images(8)
    for model in (masked, plain):
        torch.manual_seed(0)
        objective = build_objective({"name": name, "eps": 0.05})
        for _ in range(2):
            model.zero_grad()
            loss, _ = objective(model, x, y, 1.0)
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            loss.backward()
    weights = [NETS["conv"]()[i].weight for i in (0, 2, 5, 7)]  # as before pruning
    effective = [plain[i].weight.grad for i in (0, 2, 5, 7)]
    for scores, weight, gradient in zip(score_parameters(masked), weights, effective, strict=True):
        torch.testing.assert_close(scores.grad, gradient * weight)  # straight through
    assert all(p.grad is None for p in weight_parameters(masked))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adversarial", "steps": 0}, "'steps' is 0"),
        ({"name": "adversarial", "step_size": 0.0}, "'step_size' is 0.0"),
        ({"name": "adversarial", "attack_mode": "test"}, "'attack_mode' is 'test'"),
        ({"name": "trades", "beta": -1.0}, "'beta' is -1.0"),
        ({"name": "trades", "attack_mode": "eval"}, "unknown key 'attack_mode'"),
        ({"name": "free", "replays": 0}, "'replays' is 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        build_objective({"eps": 0.1, **settings})
