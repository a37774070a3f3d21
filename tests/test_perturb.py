"""Perturbed batches: attacks whose outcome is known by hand, and that they leave no trace in the model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.threat import L2Ball, LinfBall, threat
from certprune.masks import score_parameters, sparsify
from certprune.objectives.perturb import attacking, frozen_modes, perturb, random_point

from .linear_nets import inner_images, linear, mixed, worst_loss
from .nets import NETS, images


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_the_attack_of_a_linear_model_is_exact(norm, random_start):
    model = linear()
    x, y = inner_images()
    # From anywhere in the ball one step of 2 eps by the sign reaches the corner; l2 needs a few.
    size, steps = (0.2, 1) if norm == "linf" else (0.1, 40)
    found = perturb(model, x, y, threat(norm, 0.1), steps, step_size=size, random_start=random_start)
    assert F.cross_entropy(model(found), y).item() == pytest.approx(worst_loss(model, x, y, norm, 0.1).item(), rel=1e-4)


@pytest.mark.parametrize("ball", [LinfBall(0.3), L2Ball(1.0), LinfBall(torch.tensor(0.3)), L2Ball(torch.tensor(1.0))])
@pytest.mark.parametrize("steps", [0, 3])
def test_points_lie_in_the_threat_set_and_move(ball, steps):
    x, y = images(16)
    found = perturb(NETS["conv"](), x, y, ball, steps)
    assert ball.contains(x, found, tolerance=1e-7).all() and not found.requires_grad
    assert ((found - x).flatten(1).norm(dim=1) > 0.1).all()


def test_the_default_step_and_no_eps():
    model = linear()
    x, y = inner_images()
    moved = perturb(model, x, y, LinfBall(0.1), 10, random_start=False, loss=lambda logits, y: logits[:, 0])
    assert torch.allclose((moved - x).abs(), torch.full_like(x, 0.1), atol=1e-6)  # 10 steps of 0.025, cut at 0.1
    assert torch.allclose(perturb(model, x, y, LinfBall(0.1), 3, random_start=False, step_size=0.01), x, atol=0.0301)
    for ball in (LinfBall(0.0), L2Ball(0.0)):
        assert torch.equal(perturb(model, x, y, ball, 3), x)


def test_random_points_fill_the_ball():
    x = torch.full((2000, 1, 2, 2), 0.5)
    moved = random_point(x, LinfBall(0.2)) - x
    assert moved.abs().max() <= 0.2 and moved.abs().mean().item() == pytest.approx(0.1, abs=0.005)
    radius = (random_point(x, L2Ball(0.4)) - x).flatten(1).norm(dim=1)
    # Uniform in four dimensions: the share within radius r is (r / eps)^4, its mean 4/5 eps.
    assert radius.max() <= 0.4 and radius.mean().item() == pytest.approx(0.32, abs=0.005)


def test_noise_is_global_in_training_and_fixed_in_validation():
    x, _ = images(4)
    ball = LinfBall(0.1)
    torch.manual_seed(1)
    one, other = random_point(x, ball), random_point(x, ball)
    torch.manual_seed(1)
    assert torch.equal(one, random_point(x, ball)) and not torch.equal(one, other)
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(random_point(x, ball), random_point(x, ball))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, mixed], ids=["train", "eval", "mixed"])
@pytest.mark.parametrize("net", ["bn", "residual"])
def test_an_attack_leaves_no_trace_in_the_model(net, mode, eval_mode):
    model = mode(NETS[net]())
    x, y = images(8)
    F.cross_entropy(model(x), y).backward()
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wanted = [p.requires_grad for p in model.parameters()]
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(model[1].training)) if net == "bn" else None
    perturb(model, x, y, LinfBall(0.1), 2, eval_mode=eval_mode)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    if net == "bn":
        assert seen == [mode is nn.Module.train and not eval_mode] * 2


def test_a_graph_made_before_the_attack_can_still_be_differentiated():
    model = NETS["bn"]().train()
    x, y = images(8)
    loss = F.cross_entropy(model(x), y)
    perturb(model, x, y, LinfBall(0.1), 2)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_masks_are_computed_once_an_attack():
    model = sparsify(NETS["conv"](), 0.5)
    with attacking(model):
        assert model[0].weight is model[0].weight and not model[0].weight.requires_grad
    assert model[0].weight is not model[0].weight and model[0].weight.requires_grad


def test_modes_and_gradients_come_back_after_an_error():
    model = NETS["bn"]().train()
    buffers = dict(model.named_buffers())
    for context in (frozen_modes(model), attacking(model), attacking(model, eval_mode=True)):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())


@pytest.mark.parametrize("eval_mode", [True, False])
def test_attacks_through_scores_leave_the_score_gradients_alone(eval_mode):
    model = sparsify(NETS["conv"](), 0.5).train()
    x, y = images(8)
    found = perturb(model, x, y, LinfBall(0.1), 3, random_start=False, eval_mode=eval_mode)
    plain = perturb(sparsify(NETS["conv"](), 0.5), x, y, LinfBall(0.1), 3, random_start=False)
    assert torch.equal(found, plain)
    F.cross_entropy(model(found), y).backward()
    assert all(scores.grad is not None and scores.grad.abs().sum() > 0 for scores in score_parameters(model))
    assert math.isfinite(sum(scores.grad.sum().item() for scores in score_parameters(model)))
