"""Objectives: ramps and weights by hand, what each loss is made of, and that minimising it raises what is proven."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.bounds import fused_cross_entropy, margin_lower_bounds, propagate, trace, worst_case_cross_entropy
from certifiers.bounds.operations import Interval
from certifiers.bounds.region import Region
from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall
from certprune.initialisation import initialise
from certprune.masks import sparsify
from certprune.objectives import OBJECTIVES, Ramp, Weight, build_objective
from certprune.objectives.warmup import WarmUp

from .nets import NETS, images

ROBUST = {"ibp": {"name": "ibp", "eps": 0.05}, "crown_ibp": {"name": "crown_ibp", "eps": 0.05}}
ALL = {
    "benign": {"name": "benign"},
    **ROBUST,
    "mixtrain": {"name": "mixtrain", "eps": 0.05, "probability": 1.0},
    "sabr": {"name": "sabr", "eps": 0.05},
    "mtl_ibp": {"name": "mtl_ibp", "eps": 0.05},
    "cc_ibp": {"name": "cc_ibp", "eps": 0.05},
    "adversarial": {"name": "adversarial", "eps": 0.05},
    "trades": {"name": "trades", "eps": 0.05},
    "free": {"name": "free", "eps": 0.05},
    "gaussian": {"name": "gaussian", "sigma": 0.1},
    "stability": {"name": "stability", "sigma": 0.1},
    "consistency": {"name": "consistency", "sigma": 0.1},
    "smoothadv": {"name": "smoothadv", "sigma": 0.1, "attack_eps": 0.5},
}


def test_the_tables_of_this_file_hold_every_objective():
    assert set(ALL) == set(OBJECTIVES)


def test_smooth_ramp():
    ramp = Ramp(start=0.2, end=0.6)
    assert [ramp(p) for p in (0.0, 0.2, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    # a (t^4 for t < 1/4), then its tangent to 1: a = 1 / (1/256 + 4/64 * 3/4) = 256/13
    assert ramp(0.25) == pytest.approx(256 / 13 * (1 / 8) ** 4)
    assert ramp(0.3) == pytest.approx(1 / 13)
    assert ramp(0.45) == pytest.approx(1 / 13 + 256 / 13 * 4 / 64 * 3 / 8)
    values = [ramp(i / 1000) for i in range(1001)]
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))
    slopes = [b - a for a, b in zip(values, values[1:], strict=False)]
    assert max(abs(b - a) for a, b in zip(slopes[:598], slopes[1:599], strict=False)) < 2e-4  # no kink before the end


def test_linear_ramp_and_weights():
    assert Ramp(start=0.0, end=0.5, shape="linear")(0.25) == 0.5
    assert Ramp(start=0.0, end=0.0)(0.0) == 1.0
    assert Weight(start=1.0, end=0.5)(0.5) == 0.75


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 0.1}, "needs a name"),
        ({"name": "crown-ibp", "eps": 0.1}, "Did you mean 'crown_ibp'"),
        ({"name": "ibp", "eps": -0.1}, "'eps' is -0.1"),
        ({"name": "ibp", "eps": "0.1"}, "'eps' is '0.1'"),
        ({"name": "ibp"}, "'eps' is missing"),
        ({"name": "ibp", "eps": float("nan")}, "finite"),
        ({"name": "ibp", "eps": 0.1, "kapa": 1}, r"unknown key 'kapa' \(did you mean 'kappa'\?\), expected one of"),
        ({"name": "ibp", "eps": 0.1, "kappa": {"start": 2.0}}, "kappa.start"),
        ({"name": "ibp", "eps": 0.1, "ramp": {"start": 0.7, "end": 0.2}}, "must end after it starts"),
        ({"name": "benign", "eps": 0.1}, "unknown key 'eps'"),
    ],
)
def test_bad_settings_are_errors_that_say_what_was_expected(settings, words):
    with pytest.raises(InputError, match=words):
        build_objective(settings)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_robust_losses_are_the_bounds(norm):
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)
    threat = (LinfBall if norm == "linf" else L2Ball)(torch.tensor(0.05))
    ibp = worst_case_cross_entropy(margin_lower_bounds(model, x, y, threat, "ibp"), y).mean()
    fused = fused_cross_entropy(model, x, y, threat).mean()
    rows = margin_lower_bounds(model, x, y, threat, "crown-ibp")
    clean = F.cross_entropy(model(x), y)

    def loss(progress, **changes):
        settings = {"norm": norm, "eps": 0.05, "warm_up": {"weight": 0.0}, **changes}
        return build_objective(settings)(model, x, y, progress)[0]

    def close(value, expected):
        return torch.allclose(value, expected, rtol=1e-5)

    assert close(loss(1.0, name="ibp"), ibp)
    assert close(loss(1.0, name="ibp", kappa={"start": 1.0, "end": 0.25}), 0.25 * clean + 0.75 * ibp)
    assert close(loss(0.0, name="ibp"), clean)
    assert close(loss(1.0, name="crown_ibp"), ibp)
    assert close(loss(1.0, name="crown_ibp", beta={"end": 1.0}), fused)
    assert close(loss(1.0, name="crown_ibp", beta={"end": 0.5}), 0.5 * fused + 0.5 * ibp)
    unfused = loss(1.0, name="crown_ibp", beta={"end": 1.0}, fusion=False)
    assert close(unfused, worst_case_cross_entropy(rows, y).mean())


def test_l1_weighs_what_masks_leave_of_the_weights_and_in_training_alone():
    x, y = images(8, seed=4)
    model = sparsify(NETS["conv"](seed=4), 0.5, "magnitude")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    plain, with_l1 = build_objective(ROBUST["ibp"]), build_objective({**ROBUST["ibp"], "l1": 1e-2})
    loss, other = plain(model, x, y, 1.0)[0], with_l1(model, x, y, 1.0)[0]
    size = sum(layer.weight.abs().sum() for layer in layers)
    assert torch.allclose(other - loss, 1e-2 * size, rtol=1e-4)
    with torch.no_grad():
        assert with_l1(model, x, y, 1.0)[0] == plain(model, x, y, 1.0)[0]


def test_figures_are_detached_scalars_and_true():
    model = NETS["bn"](seed=1)
    x, y = images(16, seed=2)
    for settings in ALL.values():
        loss, figures = build_objective(settings)(model, x, y, 0.3)
        assert loss.dim() == 0 and loss.requires_grad
        assert all(v.dim() == 0 and not v.requires_grad for v in figures.values())
        with torch.no_grad():  # in training the clean batch is run only where the loss needs it
            clean = build_objective(settings)(model, x, y, 0.3)[1]["clean_accuracy"]
        assert clean.item() == (model(x).argmax(1) == y).float().mean().item()
    with torch.no_grad():
        _, figures = build_objective(ROBUST["ibp"])(model, x, y, 1.0)
        margins = margin_lower_bounds(model, x, y, LinfBall(0.05), "ibp")
    certified = sum(all(m > 0 for j, m in enumerate(row) if j != label) for row, label in zip(margins, y, strict=True))
    assert figures["certified_accuracy"].item() == pytest.approx(certified / 16)
    assert figures["eps"].item() == pytest.approx(0.05)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("net", ["conv", "bn", "residual"])
def test_a_few_steps_lower_the_loss(name, net):
    model = NETS[net](seed=3).train()
    x, y = images(32, seed=3)
    objective = build_objective(ALL[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = objective(model, x, y, 1.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_warm_up_terms_by_hand():
    # One layer of centres (2, 1, -1, 0): active sum 3, inactive 1; ratio 1/3. Mean .5; squares about it:
    # active 2.25 + .25 = 2.5, inactive 2.25 + .25 = 2.5; ratio 1. With tau .5: (.5 - 1/3) + 0.
    centre = torch.tensor([[2.0, 1.0, -1.0, 0.0]])
    assert WarmUp()._imbalance(centre).item() == pytest.approx(1 / 6, abs=1e-6)
    # Widths: input .1, layer .4, so .1/.4 = .25 misses .5 by .25. Both over tau, one layer: (.25 + 1/6) / .5.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    network = trace(model, (4,)).bind()
    x = torch.full((1, 4), 0.5)
    intervals = propagate(network, Region.of(x, LinfBall(0.1)))
    intervals = intervals.replace(1, Interval(centre, torch.full((1, 4), 0.4)))
    assert WarmUp().loss(network, intervals).item() == pytest.approx((0.25 + 1 / 6) / 0.5, abs=1e-5)


def test_warm_up_fades_with_the_ramp():
    model = NETS["conv"](seed=4)
    x, y = images(8, seed=4)

    def loss(progress, weight):
        settings = {**ROBUST["ibp"], "warm_up": {"weight": weight}, "ramp": {"end": 0.5}}
        return build_objective(settings)(model, x, y, progress)[0].item()

    assert loss(0.1, 0.5) > loss(0.1, 0.0)
    assert loss(0.5, 0.5) == loss(0.5, 0.0)


def test_ibp_initialisation_keeps_interval_widths():
    """Its purpose: E|w| n / 2 = 1, so the mean width after a ReLU is that before the layer."""
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(300, 300), nn.ReLU())), nn.Linear(300, 2))
    initialise(model, "ibp", seed=0)
    weight = model[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 300, rel=0.02)
    assert model[-1].weight.abs().max().item() <= 1 / math.sqrt(300)  # the last layer's, and biases: as Linear draws
    assert all(0 < m.bias.abs().max().item() <= 1 / math.sqrt(300) for m in model if isinstance(m, nn.Linear))
    box = Region.of(torch.full((8, 300), 0.5), LinfBall(0.01))
    widths = [b.radius.mean().item() for b in propagate(trace(model, (300,)).bind(), box).boxes]
    assert 0.7 < widths[12] / widths[0] < 1.4  # after six layers


def test_initialisation_depends_on_the_seed_alone():
    weights = []
    for seed in (0, 0, 1):
        for name in ("ibp", "default", "he"):
            model = nn.Linear(5, 5)
            torch.rand(seed + 3)
            initialise(model, name, seed)
            weights.append(model.weight.detach().clone())
    assert all(torch.equal(weights[i], weights[3 + i]) for i in range(3))
    assert not any(torch.equal(weights[i], weights[6 + i]) for i in range(3))
    with pytest.raises(InputError, match="initialisation"):
        initialise(nn.Linear(2, 2), "xavier", 0)
