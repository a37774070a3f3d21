"""No bound may ever be violated: random networks, sampled points and corners, gradient attacks."""

from __future__ import annotations

import pytest
import torch

from certifiers.attack import pgd
from certifiers.bounds import METHODS, Region, fused_cross_entropy, margin_lower_bounds, propagate, trace
from certifiers.threat import L2Ball, LinfBall

from .random_nets import CLASSES, SHAPE, random_net

NETS = 50
POINTS = 2000
BATCH = 4
TOLERANCE = 1e-5  # relative to the largest logit: float32 rounding of the sums


def inputs(seed: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    x[0] = (x[0] > 0.5).to(dtype)  # at the ends of the pixel range, where the box is cut
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def points(threat, x: torch.Tensor, seed: int, count: int = POINTS // BATCH) -> torch.Tensor:
    """``(count, batch, *shape)`` inside the threat set: corners, faces, interior, and the clean inputs."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = threat.box(x)
    u = torch.rand(count, *x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    u[: count // 2] = (u[: count // 2] > 0.5).to(x.dtype)
    inside = lower + u * (upper - lower)
    inside[0], inside[1], inside[2] = x, lower, upper
    return torch.stack([threat.project(x, p) for p in inside])


def margins_at(model, adversarial: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """True margins ``(count, batch, classes)`` at ``(count, batch, *shape)`` points, in float64."""
    logits = model.double()(adversarial.double().flatten(0, 1)).unflatten(0, adversarial.shape[:2])
    return logits.gather(2, y.expand(len(adversarial), -1).unsqueeze(2)) - logits


@pytest.mark.parametrize("seed", range(NETS))
def test_no_point_violates_a_bound(seed):
    model = random_net(seed)
    x, y = inputs(seed)
    eps = [0.01, 0.05, 0.1, 0.3][seed % 4]
    with torch.no_grad():
        for threat in (LinfBall(eps), L2Ball(4 * eps)):
            bounds = {m: margin_lower_bounds(model, x, y, threat, m) for m in METHODS}
            loss = fused_cross_entropy(model, x, y, threat)
            found = margins_at(random_net(seed), points(threat, x, seed), y)
            scale = found.abs().max().clamp(min=1.0)
            for method, bound in bounds.items():
                assert torch.isfinite(bound).all()
                assert (found.amin(0) - bound >= -TOLERANCE * scale).all(), method
            worst = torch.logsumexp(-found, 2).amax(0)
            assert (loss >= worst - TOLERANCE * scale).all()


@pytest.mark.parametrize("seed", range(0, NETS, 5))
def test_every_box_holds_its_values(seed):
    model = random_net(seed, torch.float64)
    x, _ = inputs(seed, torch.float64)
    threat = LinfBall(0.1)
    graph = trace(model, SHAPE)
    boxes = propagate(graph.bind(), Region.of(x, threat)).boxes
    for point in points(threat, x, seed, 50):
        for value, box in zip(graph.bind(point).values, boxes, strict=True):
            assert (value >= box.lower - 1e-9).all() and (value <= box.upper + 1e-9).all()


@pytest.mark.parametrize("seed", range(0, NETS, 2))
def test_attacks_stay_above_the_bounds(seed):
    model = random_net(seed)
    x, y = inputs(seed)
    eps = [0.01, 0.05, 0.1][seed % 3]
    for threat in (LinfBall(eps), L2Ball(4 * eps)):
        with torch.no_grad():
            bounds = {m: margin_lower_bounds(model, x, y, threat, m) for m in METHODS}
            loss = fused_cross_entropy(model, x, y, threat)
        adversarial = pgd(model, x, y, threat, steps=30, restarts=2, seed=seed)
        found = margins_at(random_net(seed), adversarial.detach().unsqueeze(0), y)[0]
        scale = found.abs().max().clamp(min=1.0)
        for method, bound in bounds.items():
            assert (found - bound >= -TOLERANCE * scale).all(), method
        assert (loss >= torch.logsumexp(-found, 1) - TOLERANCE * scale).all()


@pytest.mark.parametrize("seed", range(0, NETS, 5))
def test_tighter_methods_are_tighter_on_average(seed):
    """CROWN-IBP beats IBP and CROWN beats CROWN-IBP on the whole, though not by theorem for each input."""
    model = random_net(seed)
    x, y = inputs(seed)
    with torch.no_grad():
        methods = ("ibp", "crown-ibp", "crown")
        ibp, crown_ibp, crown = (margin_lower_bounds(model, x, y, LinfBall(0.05), m).mean() for m in methods)
    assert ibp <= crown_ibp + 1e-4 * ibp.abs() and crown_ibp <= crown + 1e-4 * crown_ibp.abs()
