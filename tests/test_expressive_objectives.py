"""SABR, MTL-IBP and CC-IBP: by hand, what they equal at either end, the orderings that are theorems, and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certifiers.bounds import margin_lower_bounds, trace, worst_case_cross_entropy
from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall
from certprune.data import load_data
from certprune.initialisation import initialise
from certprune.masks import mask_state, materialize, sparsify
from certprune.models import build_model
from certprune.objectives import build_objective, certified, expressive, sabr
from certprune.objectives.sabr import small_box
from certprune.optimizers import Group
from certprune.stage_settings import Adam, StageSettings
from certprune.training import Plan, train

from .nets import NETS, images

EPS = 0.05
NAMES = ("sabr", "mtl_ibp", "cc_ibp")


def objective(name, **settings):
    return build_objective({"name": name, "eps": EPS, "warm_up": {"weight": 0.0}, **settings})


def loss(name, model, x, y, progress=1.0, **settings):
    torch.manual_seed(5)  # the same random start for every objective
    return objective(name, **settings)(model, x, y, progress)[0]


def attacked(model, x, y, threat, steps=1):
    torch.manual_seed(5)
    return certified.attack(trace(model, tuple(x.shape[1:])).bind(), x, y, threat, steps)


def steps_of(name, model, x, y, eps=EPS, **settings):
    """The objective, the bounds of one step, and its loss for each input."""
    chosen = objective(name, **settings)
    torch.manual_seed(5)
    step = chosen.bound(trace(model, tuple(x.shape[1:])).bind(x), x, y, eps)
    ibp = certified.interval_margins(step.network, step.intervals, y)
    return chosen, step, ibp, chosen.robust_loss(step, ibp, 1.0)


# What the losses are.


def linear_model(weights):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weights), 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([weights, [0.0] * len(weights)]))
        model[1].bias.copy_(torch.tensor([0.3, 0.0]))
    return model


def softplus(value):
    return math.log1p(math.exp(value))


def test_one_layer_by_hand():
    # Margin of class 0: 2 * .5 - 1 * .5 + .3 = .8; |w|_1 = 3. Within .05 the worst is .8 - .15, within .1 (where a
    # step of 2.5 eps from anywhere ends in the worst corner) .8 - .3.
    model = linear_model([2.0, -1.0])
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    settings = {"alpha": 0.25, "attack_eps_factor": 2.0}
    assert loss("mtl_ibp", model, x, y, **settings).item() == pytest.approx(
        0.75 * softplus(-0.5) + 0.25 * softplus(-0.65)
    )
    assert loss("cc_ibp", model, x, y, **settings).item() == pytest.approx(softplus(-(0.75 * 0.5 + 0.25 * 0.65)))


def test_small_box_by_hand():
    # eps .1, radius .04: the centre may be .06 from x; boxes end at x +- .1 and at the pixel range.
    x = torch.tensor([[0.5, 0.5, 0.5, 0.02, 0.02, 1.0]])
    attacked = torch.tensor([[0.6, 0.45, 0.5, 0.0, 0.12, 0.9]])
    box = small_box(x, attacked, LinfBall(0.1), 0.4)
    lower = torch.tensor([[0.52, 0.41, 0.46, 0.0, 0.04, 0.9]])
    upper = torch.tensor([[0.6, 0.49, 0.54, 0.04, 0.12, 0.98]])
    torch.testing.assert_close(box.lower, lower)
    torch.testing.assert_close(box.upper, upper)


def test_sabr_by_hand(monkeypatch):
    # Attacked at (.54, .52), eps .05, radius .02: centre (.53, .52). Margin 2 * .53 - .52 + .3 = .84, less 3 * .02.
    monkeypatch.setattr(sabr, "attack", lambda *_: torch.tensor([[[[0.54, 0.52]]]]))
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    value = loss("sabr", linear_model([2.0, -1.0]), x, y, subselection=0.4).item()
    assert value == pytest.approx(softplus(-0.78))


@pytest.mark.parametrize("net", ["conv", "bn", "residual"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_alpha_goes_from_the_attacked_loss_to_ibp(net, norm):
    model = NETS[net](seed=1)
    x, y = images(8, seed=1)
    threat = (LinfBall if norm == "linf" else L2Ball)(EPS)
    ibp = worst_case_cross_entropy(margin_lower_bounds(model, x, y, threat, "ibp"), y).mean()
    adversarial = F.cross_entropy(model(attacked(model, x, y, threat, 3)), y)
    assert adversarial > F.cross_entropy(model(x), y)
    for name in ("mtl_ibp", "cc_ibp"):
        for alpha, expected in ((0.0, adversarial), (1.0, ibp)):
            value = loss(name, model, x, y, norm=norm, steps=3, alpha=alpha)
            assert torch.allclose(value, expected, rtol=1e-5), (name, alpha)
    mixed = loss("mtl_ibp", model, x, y, norm=norm, steps=3, alpha=0.25)
    assert torch.allclose(mixed, 0.75 * adversarial + 0.25 * ibp, rtol=1e-5)


@pytest.mark.parametrize("net", ["conv", "bn", "residual"])
def test_sabr_of_the_whole_box_is_ibp(net):
    model = NETS[net](seed=1)
    x, y = images(8, seed=1)
    ibp = worst_case_cross_entropy(margin_lower_bounds(model, x, y, LinfBall(EPS), "ibp"), y).mean()
    assert torch.allclose(loss("sabr", model, x, y, subselection=1.0), ibp, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_ramp_starts_at_the_clean_loss_and_kappa_mixes_it_in(name, monkeypatch):
    model = NETS["conv"](seed=2)
    x, y = images(8, seed=2)
    clean = F.cross_entropy(model(x), y)
    at_end = loss(name, model, x, y)
    mixed = loss(name, model, x, y, kappa={"start": 1.0, "end": 0.25})
    assert torch.allclose(mixed, 0.25 * clean + 0.75 * at_end, rtol=1e-5)
    for module in (sabr, expressive):
        monkeypatch.setattr(module, "attack", None)  # at eps 0 there is nothing to attack
    assert torch.allclose(loss(name, model, x, y, progress=0.0), clean, rtol=1e-5)


# Orderings that are theorems.


@pytest.mark.parametrize("net", ["mlp", "conv", "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_attacked_below_cc_ibp_below_mtl_ibp_below_ibp(net, seed):
    """For each input; the cross-entropy is convex in the margins, and an attack cannot beat a bound."""
    model = NETS[net](seed=seed, dtype=torch.float64)
    x, y = images(32, seed=seed, dtype=torch.float64)
    losses = []
    for alpha in (0.0, 0.1, 0.5, 0.9, 1.0):
        cc, mtl = (steps_of(name, model, x, y, alpha=alpha)[3] for name in ("cc_ibp", "mtl_ibp"))
        assert (cc <= mtl + 1e-9).all()
        if 0 < alpha < 1:
            assert (cc < mtl - 1e-6).any()  # and they are not the same loss
        losses += [torch.stack([cc, mtl])]
    assert all((low <= high + 1e-9).all() for low, high in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("net", ["mlp", "conv", "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_a_larger_small_box_holds_the_smaller_one_up_to_the_whole(net, seed):
    """At one attack, for each input: SABR's loss grows with the box, and IBP's is above it."""
    model = NETS[net](seed=seed, dtype=torch.float64)
    x, y = images(32, seed=seed, dtype=torch.float64)
    x[:4] = x[:4].round()  # black and white pixels, where boxes are cut
    losses, boxes = [], []
    for share in (0.01, 0.2, 0.4, 0.8, 1.0):
        _, step, _, each = steps_of("sabr", model, x, y, subselection=share)
        losses.append(each)
        boxes.append(step.intervals.region.box)
    assert all((low <= high + 1e-9).all() for low, high in zip(losses, losses[1:], strict=False))
    assert (losses[0] < losses[-1] - 1e-6).all()
    for inner, outer in zip(boxes, boxes[1:], strict=False):
        assert (inner.lower >= outer.lower - 1e-12).all() and (inner.upper <= outer.upper + 1e-12).all()


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_points_of_the_small_box_are_in_the_threat_set(share):
    x, y = images(16, seed=3)
    x[:8] = x[:8].round()
    threat = LinfBall(EPS)
    start = attacked(NETS["conv"](seed=3), x, y, threat, 8)
    box = small_box(x, start, threat, share)
    assert (box.radius >= 0).all() and (box.radius <= share * EPS + 1e-7).all()
    for i in range(50):
        u = torch.rand(x.shape, generator=torch.Generator().manual_seed(i))
        u = u.round() if i % 2 else u
        point = box.lower + u * (box.upper - box.lower)
        assert threat.contains(x, point).all()
    assert ((start >= box.lower - 1e-6) & (start <= box.upper + 1e-6)).all()


# What the attack sees, and what it leaves alone.


def test_the_larger_attack_is_for_training_only():
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)
    settings = {"alpha": 0.0, "attack_eps_factor": 3.0}
    wide = F.cross_entropy(model(attacked(model, x, y, LinfBall(3 * EPS))), y)
    assert torch.allclose(loss("mtl_ibp", model, x, y, **settings), wide, rtol=1e-5)
    with torch.no_grad():
        validation = loss("mtl_ibp", model, x, y, **settings)
        assert validation == loss("mtl_ibp", model, x, y, alpha=0.0)
    assert validation < wide


@pytest.mark.parametrize("name", NAMES)
def test_validation_attacks_alike_each_time_and_leaves_no_trace(name):
    model = NETS["bn"](seed=1)
    x, y = images(8, seed=1)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with torch.no_grad():
            value, figures = objective(name)(model, x, y, 1.0)
        values.append(value)
        assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1] and not values[0].requires_grad
    assert all(p.grad is None for p in model.parameters())
    margins = margin_lower_bounds(model, x, y, LinfBall(EPS), "ibp")
    assert figures["certified_accuracy"] == certified.share_certified(margins, y)


def test_figures_by_hand(monkeypatch):
    # Margins of class 0, 2 x0 - x1 + .3: .8 and .13; at worst .15 less within .05, and .06 less within .02.
    model = linear_model([2.0, -1.0])
    x, y = torch.tensor([[0.5, 0.5], [0.165, 0.5]]).view(2, 1, 1, 2), torch.zeros(2, dtype=torch.int64)
    figures = objective("cc_ibp")(model, x, y, 1.0)[1]
    assert figures["attack_accuracy"] == 0.5 and figures["certified_accuracy"] == 0.5
    monkeypatch.setattr(sabr, "attack", lambda network, x, *_: x)
    figures = objective("sabr", subselection=0.4)(model, x, y, 1.0)[1]
    assert figures["box_accuracy"] == 1.0 and "certified_accuracy" not in figures
    with torch.no_grad():
        assert objective("sabr", subselection=0.4)(model, x, y, 1.0)[1]["certified_accuracy"] == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", ["bn", "residual"])
def test_batch_norm_keeps_to_the_clean_batch(name, net):
    """Modes stay, running statistics move once, by the clean batch, whatever the attack does."""
    model = NETS[net](seed=4).train()
    twin = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    x, y = images(32, seed=4)
    loss(name, model, x, y).backward()
    twin(x)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert all(m.training for m in model.modules())
    norms[0].eval()  # as in the prune stage
    mean = norms[0].running_mean.clone()
    loss(name, model, x + 0.1, y)
    assert not norms[0].training and all(m.training for m in model.modules() if m is not norms[0])
    assert torch.equal(norms[0].running_mean, mean)


def test_attacked_logits_use_the_clean_statistics(monkeypatch):
    model = NETS["bn"](seed=4).train()
    x, y = images(32, seed=4)
    moved = (x + EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    monkeypatch.setattr(expressive, "attack", lambda *_: moved)
    fixed = copy.deepcopy(model)
    handles = [
        m.register_forward_hook(_remember) for m in fixed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    fixed(x)
    for handle in handles:
        handle.remove()
    expected = F.cross_entropy(fixed.eval()(moved), y)
    for name in ("mtl_ibp", "cc_ibp"):
        value = loss(name, model, x, y, alpha=0.0)
        assert torch.allclose(value, expected, rtol=1e-4)
        assert not torch.allclose(value, F.cross_entropy(copy.deepcopy(model)(moved), y), rtol=1e-4)


def _remember(norm, inputs, _):
    """Set a BatchNorm's running statistics to those of its batch, as it normalises with (biased variance)."""
    x = inputs[0].transpose(0, 1).flatten(1)
    norm.running_mean.copy_(x.mean(1).detach())
    norm.running_var.copy_(x.var(1, unbiased=False).detach())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", ["conv", "bn", "residual"])
def test_gradients_reach_the_scores_of_kept_and_removed_weights(name, net):
    x, y = images(16, seed=6)
    model = sparsify(NETS[net](seed=6), 0.7, "score")
    plain = materialize(model)
    values = [loss(name, one, x, y) for one in (model, plain)]
    assert torch.equal(*values)
    assert all(p.grad is None for p in model.parameters())  # the attack left them alone
    for value in values:
        value.backward()
    for weight, mask in mask_state(model).items():
        layer = model.get_submodule(weight.removesuffix(".weight"))
        gradient = plain.get_parameter(weight).grad
        original = layer.parametrizations.weight.original
        assert gradient[~mask].abs().max() > 0 and gradient[mask].abs().max() > 0
        torch.testing.assert_close(layer.parametrizations.weight[0].scores.grad, gradient * original.detach())


# Settings and training.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "sabr", "norm": "l2"}, "'norm' is 'l2': input should be 'linf'"),
        ({"name": "sabr", "subselection": 0.0}, "'subselection' is 0.0"),
        ({"name": "sabr", "subselection": 1.5}, "'subselection' is 1.5"),
        ({"name": "sabr", "steps": -1}, "'steps' is -1"),
        ({"name": "sabr", "alpha": 0.5}, "unknown key 'alpha'"),
        ({"name": "mtl_ibp", "alpha": -0.1}, "'alpha' is -0.1"),
        ({"name": "cc_ibp", "alpha": 1.1}, "'alpha' is 1.1"),
        ({"name": "cc_ibp", "attack_eps_factor": 0.0}, "'attack_eps_factor' is 0.0"),
        ({"name": "mtl_ibp", "subselection": 0.5}, "unknown key 'subselection'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        build_objective({"eps": 0.1, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_a_short_training_can_be_certified(name, tmp_path):
    data = load_data("digits", validation=0.1)
    torch.manual_seed(0)
    model = build_model("mlp", data.shape, data.classes, hidden=[32])
    initialise(model, "ibp", 0)
    settings = StageSettings(epochs=8, batch_size=32, optimizer=Adam(lr=5e-3), ramp=True)
    plan = Plan(stage="pretrain", settings=settings, epochs=8)
    chosen = build_objective({"name": name, "eps": EPS})
    result = train(model, [Group(list(model.parameters()), plan.settings.optimizer)], chosen, data, plan, tmp_path)
    losses = [row["validation"]["loss"] for row in result.history]
    assert losses[-1] < losses[0]
    model.eval()
    x, y = data.test.x[:200], data.test.y[:200]
    with torch.no_grad():
        clean = (model(x).argmax(1) == y).float().mean()
        proven = certified.share_certified(margin_lower_bounds(model, x, y, LinfBall(EPS), "crown-ibp"), y)
    assert clean > 0.8 and proven > 0.7
