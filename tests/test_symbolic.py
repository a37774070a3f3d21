"""Symbolic intervals: by hand, against an exact search, against independent zonotopes and auto_LiRPA; MixTrain."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from certifiers.bounds import Region, margin_lower_bounds, propagate, trace, worst_case_cross_entropy
from certifiers.bounds.margins import margin_rows
from certifiers.bounds.symbolic import Symbolic
from certifiers.bridges import import_auto_lirpa
from certifiers.lirpa import margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from certprune.masks import score_parameters, sparsify
from certprune.models import build_model
from certprune.objectives import build_objective

from .nets import NETS, images
from .random_nets import CLASSES, SHAPE, random_net

WAYS = ("rows", "patches", "forms", "cheapest")
DOUBLE = torch.float64


def linear(weight: list, bias: list) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=DOUBLE))
        layer.bias.copy_(torch.tensor(bias, dtype=DOUBLE))
    return layer


def margins(model: nn.Module, x, y, threat, way: str, memory_mb: float = 512):
    network = trace(model, tuple(x.shape[1:])).bind(x)
    rows, _ = margin_rows(network, y, x)
    return Symbolic(network, propagate(network, Region.of(x, threat)), memory_mb, way).lower_bounds(rows)


def test_by_hand():
    """z = +-(2x - 1) in [-1, 1]: slope 1/2, error 1/4. The margin r1 - r2 is then 2x - 1 -+ 1/2."""
    x, y = torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([0])
    first = linear([[2.0], [-2.0]], [-1.0, 1.0])
    difference = nn.Sequential(first, nn.ReLU(), linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])).eval()
    assert margin_lower_bounds(difference, x, y, LinfBall(0.5), "symbolic")[0, 1].item() == pytest.approx(-1.5)
    # At eps 1/4: z in [-1/2, 1/2], slope 1/2, error 1/8: -1/2 - 1/4.
    assert margin_lower_bounds(difference, x, y, LinfBall(0.25), "symbolic")[0, 1].item() == pytest.approx(-0.75)
    # r1 + r2 = |2x - 1|: the slopes cancel, and 1/2 -+ 1/2 is left.
    together = nn.Sequential(first, nn.ReLU(), linear([[1.0, 1.0], [0.0, 0.0]], [0.0, 0.0])).eval()
    assert margin_lower_bounds(together, x, y, LinfBall(0.5), "symbolic")[0, 1].item() == pytest.approx(0.0)
    # A LeakyReLU of slope 1/2: chord 3/4, error 1/8 each. r1 - r2 = 3/4 (4x - 2) -+ 1/4 >= -3/2 - 1/4.
    leaky = nn.Sequential(first, nn.LeakyReLU(0.5), linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])).eval()
    assert margin_lower_bounds(leaky, x, y, LinfBall(0.5), "symbolic")[0, 1].item() == pytest.approx(-1.75)


def zonotope_margins(model: nn.Sequential, x, y, eps: float) -> np.ndarray:
    """The margins of a fully connected network by dense zonotopes: one generator a pixel and an unstable unit."""
    out = []
    for image, label in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True):
        lower, upper = np.clip(image - eps, 0, 1), np.clip(image + eps, 0, 1)
        centre, generators = (lower + upper) / 2, np.diag((upper - lower) / 2)
        for layer in model:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().double().numpy()
                centre = weight @ centre + layer.bias.detach().double().numpy()
                generators = generators @ weight.T
            elif isinstance(layer, nn.ReLU):
                reach = np.abs(generators).sum(0)
                low, high = centre - reach, centre + reach
                slope = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, high / (high - low)))
                error = np.where((low < 0) & (high > 0), -slope * low / 2, 0.0)
                centre = slope * centre + error
                generators = np.vstack([generators * slope, np.diag(error)])
        spread = generators[:, [label]] - generators
        out.append(centre[label] - centre - np.abs(spread).sum(0))
    return np.array(out)


@pytest.mark.parametrize("seed", range(4))
def test_equals_dense_zonotopes(seed):
    model = NETS["mlp"](seed=seed, dtype=DOUBLE)
    x, y = images(5, seed=seed, dtype=DOUBLE)
    found = margin_lower_bounds(model, x, y, LinfBall(0.1), "symbolic").detach().numpy()
    np.testing.assert_allclose(found, zonotope_margins(model, x, y, 0.1), atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_equals_auto_lirpa_with_the_same_slopes(name, monkeypatch):
    """Backward CROWN whose lower line has the chord's slope too, by an independent implementation."""
    lirpa = import_auto_lirpa()

    class SameSlope(lirpa.BoundedModule):
        def __init__(self, *arguments, bound_opts, **keywords):
            slopes = {"relu": "same-slope", "activation_bound_option": "same-slope"}  # as 0.3 and as 0.7 call it
            super().__init__(*arguments, bound_opts=bound_opts | slopes, **keywords)

    monkeypatch.setattr(lirpa, "BoundedModule", SameSlope)
    for seed, eps in itertools.product((1, 5), (0.02, 0.1)):
        model = NETS[name](seed=seed, dtype=DOUBLE)
        x, y = images(4, seed=1, dtype=DOUBLE)
        ours = margin_lower_bounds(model, x, y, LinfBall(eps), "symbolic")
        reference = margin_lower_bounds_lirpa(model, x, y, LinfBall(eps), "crown")
        assert (ours - reference).abs().max() <= 1e-8 * reference.abs().max()


def exact_margins(model: nn.Sequential, lower, upper, label: int, classes: int) -> list[float]:
    """The least margin to every class: a linear program for each pattern of active units."""
    first, second, last = (
        (m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)
    )
    best, box = [np.inf] * classes, list(zip(lower, upper, strict=True))
    for one in itertools.product((0, 1), repeat=len(first[1])):
        on1 = np.diag(one)
        w2, b2 = second[0] @ on1 @ first[0], second[0] @ on1 @ first[1] + second[1]
        signs1 = 1 - 2 * np.array(one)  # active: -z <= 0
        if linprog(0 * first[0][0], signs1[:, None] * first[0], -signs1 * first[1], bounds=box).status == 2:
            continue  # no input has this pattern
        for two in itertools.product((0, 1), repeat=len(second[1])):
            on2 = np.diag(two)
            signs2 = 1 - 2 * np.array(two)
            rows = np.vstack([signs1[:, None] * first[0], signs2[:, None] * w2])
            ends = -np.concatenate([signs1 * first[1], signs2 * b2])
            w3, b3 = last[0] @ on2 @ w2, last[0] @ on2 @ b2 + last[1]
            for j in range(classes):
                found = linprog(w3[label] - w3[j], rows, ends, bounds=box)
                if found.status == 2:
                    break
                if found.status == 0:
                    best[j] = min(best[j], found.fun + b3[label] - b3[j])
    return best


@pytest.mark.parametrize("seed", range(3))
def test_never_tighter_than_exact(seed):
    torch.manual_seed(seed)
    layers = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)
    model = nn.Sequential(*layers).double().eval()
    x, y = torch.rand(1, 2, dtype=DOUBLE), torch.tensor([seed % 3])
    for eps in (0.1, 0.4):
        lower, upper = (end[0].tolist() for end in LinfBall(eps).box(x))
        exact = exact_margins(model, lower, upper, int(y), 3)
        found = margin_lower_bounds(model, x, y, LinfBall(eps), "symbolic")[0].tolist()
        assert all(ours <= best + 1e-9 for ours, best in zip(found, exact, strict=True))


@pytest.mark.parametrize("seed", range(24))
def test_every_way_gives_the_same_bounds(seed):
    """Random networks with every kind of layer; with so little memory that rows go one by one, too."""
    model = random_net(seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, *SHAPE, generator=generator, dtype=DOUBLE)
    y = torch.randint(CLASSES, (3,), generator=generator)
    for threat in (LinfBall(0.05), L2Ball(0.2)):
        reference = margins(model, x, y, threat, "rows")
        for way, memory in itertools.product(WAYS, (512, 1e-3)):
            assert torch.allclose(margins(model, x, y, threat, way, memory), reference, rtol=1e-9, atol=1e-9)


def test_convolutions_without_a_relu_between_them():
    """A patch that reaches over the border of the plane between must not count what is not there."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 3, 3, padding=2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=2),
    )
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).double().eval()
    x, y = images(3, seed=0, dtype=DOUBLE)
    model(x)
    for threat in (LinfBall(0.1), L2Ball(0.5)):
        assert torch.allclose(margins(model, x, y, threat, "patches"), margins(model, x, y, threat, "rows"))


def test_pixels_that_cannot_move_cost_nothing():
    model = NETS["mlp"](seed=2, dtype=DOUBLE)
    x, y = images(3, seed=2, dtype=DOUBLE)
    region = Region.of(x, LinfBall(0.1))
    region.box.radius[:, :, 2:] = 0.0
    network = trace(model, tuple(x.shape[1:])).bind()
    rows, _ = margin_rows(network, y, x)
    found = {way: Symbolic(network, propagate(network, region), way=way) for way in ("rows", "forms")}
    assert torch.allclose(found["rows"].lower_bounds(rows), found["forms"].lower_bounds(rows))
    assert found["forms"]._forms.pixels == 16  # two rows of eight


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_every_way(way):
    model = NETS["conv"](seed=4, dtype=DOUBLE)
    x, y = images(4, seed=2, dtype=DOUBLE)
    gradients = []
    for each in (way, "rows"):
        model.zero_grad()
        margins(model, x, y, LinfBall(0.1), each).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, reference in zip(*gradients, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-9, atol=1e-12)


def test_numerical_gradient():
    model = NETS["mlp"](seed=3, dtype=DOUBLE)
    x, y = images(2, seed=3, dtype=DOUBLE)
    weight = model[1].weight

    def loss():
        return margin_lower_bounds(model, x, y, LinfBall(0.1), "symbolic").sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 1e-6
    with torch.no_grad():
        weight += step
        up = loss()
        weight -= 2 * step
        down = loss()
    assert ((up - down) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def mixtrain(**changes):
    settings = {"name": "mixtrain", "eps": 0.1, "images": 3, "probability": 1.0, **changes}
    return build_objective(settings)


def test_mixtrain_is_clean_loss_and_bound_of_the_drawn_images():
    model = NETS["conv"](seed=1)
    x, y = images(12, seed=1)
    torch.manual_seed(7)
    torch.rand(())
    chosen = torch.randperm(12)[:3]
    bound = margin_lower_bounds(model, x[chosen], y[chosen], LinfBall(0.1), "symbolic")
    robust = worst_case_cross_entropy(bound, y[chosen]).mean()
    clean = nn.functional.cross_entropy(model(x), y)
    torch.manual_seed(7)
    loss, figures = mixtrain(kappa={"start": 1.0, "end": 0.25})(model, x, y, 1.0)
    assert loss.item() == pytest.approx((0.25 * clean + 0.75 * robust).item(), rel=1e-5)
    assert figures["robust_loss"].item() == pytest.approx(robust.item(), rel=1e-5)


def test_mixtrain_bounds_a_batch_with_its_probability():
    model = NETS["mlp"](seed=1)
    x, y = images(4, seed=1)
    torch.manual_seed(0)
    bounded = sum("robust_loss" in mixtrain(images=1, probability=0.3)(model, x, y, 1.0)[1] for _ in range(300))
    assert 60 <= bounded <= 120  # 90 expected; four standard deviations are 32
    assert "robust_loss" not in mixtrain(probability=0.0)(model, x, y, 1.0)[1]


def test_mixtrain_ramps_apart():
    model = NETS["mlp"](seed=1)
    x, y = images(4, seed=1)
    objective = mixtrain(
        ramp={"end": 0.4}, kappa={"start": 0.9, "end": 0.1}, kappa_ramp={"start": 0.4, "end": 0.8, "shape": "linear"}
    )
    figures = [objective(model, x, y, progress)[1] for progress in (0.0, 0.4, 0.6, 0.8)]
    assert [f["eps"].item() for f in figures] == pytest.approx([0.0, 0.1, 0.1, 0.1])
    assert [f["kappa"].item() for f in figures] == pytest.approx([0.9, 0.9, 0.5, 0.1])


def test_mixtrain_validates_on_the_same_images_every_time():
    model = NETS["conv"](seed=1)
    x, y = images(8, seed=1)
    with torch.no_grad():
        losses = {mixtrain(validation_images=5)(model, x, y, 1.0)[0].item() for _ in range(3)}
        bound = margin_lower_bounds(model, x[:5], y[:5], LinfBall(0.1), "symbolic")
        _, figures = mixtrain(validation_images=5)(model, x, y, 1.0)
    assert len(losses) == 1
    assert figures["robust_loss"].item() == pytest.approx(worst_case_cross_entropy(bound, y[:5]).mean().item())


def test_mixtrain_trains_scores():
    model = NETS["conv"](seed=1)
    sparsify(model, sparsity=0.5, criterion="score", budget="uniform")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scores = score_parameters(model)
    for score in scores:
        score.requires_grad_(True)
    x, y = images(6, seed=1)
    mixtrain()(model.train(), x, y, 1.0)[0].backward()
    assert all(score.grad is not None and score.grad.abs().sum() > 0 for score in scores)


@pytest.mark.skipif("CERTPRUNE_HYDRA_PATH" not in os.environ, reason="set CERTPRUNE_HYDRA_PATH to a checkout of HYDRA")
def test_equals_hydra():
    """On images that hold both a 0 and a 1, HYDRA's box is ours."""
    from benchmarks.symbolic import hydra_margins

    model = build_model("cnn_small", (1, 28, 28), 10).eval()
    x, y = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    theirs = hydra_margins(os.environ["CERTPRUNE_HYDRA_PATH"])(model, 0.1, x, y)
    ours = margin_lower_bounds(model, x, y, LinfBall(0.1), "symbolic")
    assert (ours - theirs).abs().max() <= 1e-4
