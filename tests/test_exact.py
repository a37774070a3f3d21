"""Complete verification: against enumeration on tiny networks, its parts by hand and by sampling, attacks, errors."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from certifiers.attack import attack
from certifiers.bounds import Region, margin_lower_bounds, propagate, trace
from certifiers.bounds.linear import crown_intervals
from certifiers.bounds.margins import margin_rows
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.exact import decide
from certifiers.exact.bounding import Domains, bound, improve, tighten
from certifiers.exact.branching import asked_of, free, halves
from certifiers.exact.milp import lowest
from certifiers.exact.reduced import reduce
from certifiers.exact.tree import Outcome, search
from certifiers.methods import METHODS, rounded_down
from certifiers.threat import L2Ball, LinfBall

from .nets import NETS, images
from .random_nets import CLASSES, SHAPE, random_net
from .test_symbolic import exact_margins

DOUBLE = torch.float64


def tiny(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)
    return nn.Sequential(*layers).double().eval()


def problem_of(model: nn.Module, x: torch.Tensor, y: int, threat):
    """The reduced question of one input (1, *shape) in float64."""
    with torch.no_grad():
        network = trace(model, tuple(x.shape[1:])).bind()
        intervals = crown_intervals(network, propagate(network, Region.of(x, threat, True), True), 512)
        rows, _ = margin_rows(network, torch.tensor([y]), x)
        return reduce(network, intervals, rows[0], torch.zeros(rows.shape[1], dtype=DOUBLE))


@pytest.mark.parametrize("seed", range(4))
def test_decides_as_enumeration_does(seed):
    """At radii around the one where the exact smallest margin crosses 0, both ways."""
    model = tiny(seed)
    x = torch.rand(2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    y = int(model(x.unsqueeze(0)).argmax())
    for eps in (0.01, 0.05, 0.15, 0.4):
        lower, upper = (end.tolist() for end in LinfBall(eps).box(x))
        least = min(m for j, m in enumerate(exact_margins(model, lower, upper, y, 3)) if j != y)
        found = decide(model, x, y, LinfBall(eps), seconds=20)
        if abs(least) < 1e-6:
            continue
        assert found.proven is bool(least > 0)
        if found.proven:
            assert found.bound <= least + 1e-7
        else:
            assert model(found.witness.unsqueeze(0)).argmax() != y
            assert LinfBall(eps).contains(x.unsqueeze(0), found.witness.unsqueeze(0)).all()


@pytest.mark.parametrize("seed", range(16))
def test_the_reduced_question_is_the_network(seed):
    """Its values equal the network's margins at points of the region, whatever the layers."""
    model = random_net(seed).double()
    if any(isinstance(m, nn.MaxPool2d) for m in model.modules()):
        pytest.skip("max pooling is refused")
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    for threat in (LinfBall(0.05), L2Ball(0.3)):
        problem = problem_of(model, x, 1, threat)
        lower, upper = threat.box(x)
        points = lower + torch.rand(200, *SHAPE, dtype=DOUBLE) * (upper - lower)
        points = threat.project(x.expand_as(points), points)
        logits = model(points)
        expected = torch.stack([logits[:, 1] - logits[:, j] for j in range(CLASSES) if j != 1], 1)
        assert torch.allclose(problem.values(points.flatten(1)), expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_hold_on_every_subdomain(seed):
    """Random splits, random alpha and beta, and optimised ones: no sampled point of a subdomain is below its bound."""
    model = NETS["conv" if seed % 2 else "mlp"](seed=seed, dtype=DOUBLE)
    x, y = images(1, seed=seed, dtype=DOUBLE)
    problem = tighten(problem_of(model, x, int(y), LinfBall(0.15)), 5)
    generator = torch.Generator().manual_seed(seed)
    pool = Domains.root(problem)
    for _ in range(2):
        weight = free(pool).double() + 1e-9
        pool = halves(pool, torch.multinomial(weight, 1, generator=generator).squeeze(1))
    pool.alpha = torch.rand(pool.alpha.shape, generator=generator, dtype=DOUBLE)
    pool.beta = torch.rand(pool.beta.shape, generator=generator, dtype=DOUBLE) * 0.1
    rows = asked_of(problem, pool)
    loose = bound(problem, rows, pool).value
    improve(problem, rows, pool, 10)
    assert (pool.bound >= loose - 1e-12).all()
    box = problem.region.box
    points = (
        box.centre + (2 * torch.rand(20000, box.centre.shape[1], dtype=DOUBLE, generator=generator) - 1) * box.radius
    )
    values, z = problem.values(points), before_units(problem, points)
    checked = 0
    for d in range(len(pool)):
        inside = ((pool.sign[d] <= 0) | (z >= 0)).all(1) & ((pool.sign[d] >= 0) | (z <= 0)).all(1)
        if inside.any():
            checked += 1
            assert values[inside, pool.question[d]].min() >= max(float(loose[d]), float(pool.bound[d])) - 1e-9
    assert checked > len(pool) // 4


def before_units(problem, points):
    h = points.new_zeros(len(points), len(problem.lower))
    z = torch.zeros_like(h)
    for level in problem.levels:
        rows = problem.before[level]
        z[:, level] = points @ rows.inputs.T + h @ rows.units.T + rows.constant
        h[:, level] = torch.relu(z[:, level])
    assert (z >= problem.lower - 1e-9).all() and (z <= problem.upper + 1e-9).all()  # and the boxes hold
    return z


def test_optimised_slopes_by_hand():
    """relu(x) - x/2 on [-1, 1] is at least 0; slope 0 gives -1/2, slope 1 gives -1/2, slope 1/2 the exact 0."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(1, 1, dtype=DOUBLE)
            self.out = nn.Linear(1, 2, bias=False, dtype=DOUBLE)
            with torch.no_grad():
                self.first.weight.fill_(2.0)
                self.first.bias.fill_(-1.0)
                self.out.weight.copy_(torch.tensor([[1.0], [0.0]]))

        def forward(self, x):
            z = self.first(x)
            return self.out(torch.relu(z) - 0.5 * z)

    x = torch.tensor([[0.5]], dtype=DOUBLE)
    problem = problem_of(Net().eval(), x, 0, LinfBall(0.5))
    pool = Domains.root(problem)
    rows = asked_of(problem, pool)
    for slope, expected in ((0.0, -0.5), (1.0, -0.5), (0.5, 0.0)):
        pool.alpha = torch.full_like(pool.alpha, slope)
        assert bound(problem, rows, pool).value.item() == pytest.approx(expected)
    pool.alpha = torch.zeros_like(pool.alpha)
    improve(problem, rows, pool, 100)
    assert pool.bound.item() == pytest.approx(0.0, abs=1e-2)
    # Split, each half is exact with the right multiplier: z >= 0 gives z/2, z <= 0 gives -z/2; least 0 at z = 0.
    parts = halves(pool, torch.tensor([0]))
    improve(problem, asked_of(problem, parts), parts, 200)
    assert parts.bound.tolist() == pytest.approx([0.0, 0.0], abs=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_never_contradicted_by_an_attack(seed):
    model = NETS["conv"](seed=seed)
    x, _ = images(4, seed=seed)
    y = model(x).argmax(1)
    threat = LinfBall(0.08)
    _, broken = attack(model, x, y, threat, 100, 5)
    crown = margin_lower_bounds(model, x, y, threat, "crown").scatter(1, y.unsqueeze(1), torch.inf).amin(1)
    for i in range(4):
        found = decide(model, x[i], int(y[i]), threat, seconds=3)
        assert not (found.proven and broken[i])
        if crown[i] > 0:
            assert found.proven is True  # what CROWN proves stays proven
        if found.proven is False:
            assert model(found.witness.float().reshape(1, *x.shape[1:])).argmax() != y[i]


@pytest.mark.parametrize("norm", [LinfBall, L2Ball])
def test_decides_what_crown_leaves_open(norm):
    """Somewhere between what CROWN proves and what an attack breaks the search decides."""
    model = NETS["mlp"](seed=0)
    x, _ = images(1, seed=5)
    y = model(x).argmax(1)
    decided = 0
    for eps in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        threat = norm(eps if norm is LinfBall else 5 * eps)
        crown = margin_lower_bounds(model, x, y, threat, "crown").scatter(1, y.unsqueeze(1), torch.inf).amin()
        if crown <= 0:
            found = decide(model, x[0], int(y), threat, seconds=10)
            decided += found.proven is not None
    assert decided >= 2


def test_only_the_classes_asked_for():
    model = tiny(1)
    x = torch.rand(2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    y = int(model(x.unsqueeze(0)).argmax())
    lower, upper = (end.tolist() for end in LinfBall(0.4).box(x))
    for j, least in enumerate(exact_margins(model, lower, upper, y, 3)):
        if j != y and abs(least) > 1e-6:
            assert decide(model, x, y, LinfBall(0.4), 20, classes=[j]).proven is bool(least > 0)
    with pytest.raises(InputError, match="classes"):
        decide(model, x, y, LinfBall(0.1), 5, classes=[y])
    with pytest.raises(InputError, match="classes"):
        decide(model, x, y, LinfBall(0.1), 5, classes=[7])


def test_no_time_is_no_answer():
    model = NETS["conv"](seed=0)
    x, _ = images(1, seed=0)
    y = int(model(x).argmax())
    problem = problem_of(NETS["conv"](seed=0, dtype=DOUBLE), x.double(), y, LinfBall(0.3))
    found = search(problem, time.monotonic() - 1, lambda point: False)
    assert found.proven is None and found.bound <= 0


def test_a_witness_counts_only_if_confirmed():
    model = tiny(0)
    x = torch.rand(1, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    y = int(model(x).argmax())
    problem = problem_of(model, x, (y + 1) % 3, LinfBall(0.1))  # false at x itself
    asked = []
    found = search(problem, time.monotonic() + 2, lambda point: bool(asked.append(point)))
    assert asked and found.proven is None


def test_leaky_and_residual_networks():
    for name, seed in itertools.product(("residual", "bn"), range(2)):
        model = NETS[name](seed=seed)
        x, _ = images(1, seed=seed)
        y = int(model(x).argmax())
        assert decide(model, x[0], y, LinfBall(0.001), seconds=10).proven is True


def test_bad_input():
    x = torch.rand(1, 4, 4)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)).eval()
    with pytest.raises(UnsupportedLayer, match="MaxPool2d"):
        decide(pooled, x, 0, LinfBall(0.1), 5)
    with pytest.raises(InputError, match="eval"):
        decide(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).train(), x, 0, LinfBall(0.1), 5)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(InputError):
        decide(linear, x + 2, 0, LinfBall(0.1), 5)
    y = int(linear(x.unsqueeze(0)).argmax())
    assert decide(linear, x, y, LinfBall(0.0), 5).proven is True  # nothing to split at all


def asked_together(model, x, y, threat):
    """The question whether everywhere some margin is positive: one group of all rows."""
    problem = problem_of(model, x, y, threat)
    return replace(problem, groups=torch.zeros(len(problem.asked), dtype=torch.long))


@pytest.mark.parametrize("integers", [True, False])
def test_a_group_of_rows_is_decided_as_a_fine_grid_says(integers, monkeypatch):
    """One of several rows must be positive at each point: which one may change from point to point."""
    monkeypatch.setattr("certifiers.exact.tree.FEW_UNITS", 200 if integers else -1)
    decided = []
    for seed, eps, shift in itertools.product(range(3), (0.15, 0.4), (-0.02, 0.02)):
        model = tiny(seed)
        x = torch.rand(1, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        problem = asked_together(model, x, 0, LinfBall(eps))
        (lower,), (upper,) = LinfBall(eps).box(x)
        ticks = torch.linspace(0, 1, 201, dtype=DOUBLE)
        grid = lower + torch.cartesian_prod(ticks, ticks) * (upper - lower)
        least = problem.answers(grid).min()
        asked = replace(problem.asked, constant=problem.asked.constant - least + shift)
        problem = replace(problem, asked=asked)  # now the least is about `shift`
        found = search(problem, time.monotonic() + 20, lambda point, p=problem: bool(p.answers(point[None]) <= 0))
        assert not (found.proven and shift < 0)
        if found.proven is False:
            assert problem.answers(found.witness[None]) <= 0
        decided.append(found.proven is (shift > 0))
    assert sum(decided) >= 11  # between the points of the grid it may be a little lower


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_groups_hold_on_every_subdomain(seed):
    """Random splits, whatever the weights: at no sampled point of a subdomain is the largest row below its bound."""
    model = NETS["conv" if seed % 2 else "mlp"](seed=seed, dtype=DOUBLE)
    x, y = images(1, seed=seed, dtype=DOUBLE)
    problem = tighten(asked_together(model, x, int(y), LinfBall(0.15)), 2)
    generator = torch.Generator().manual_seed(seed)
    pool = Domains.root(problem)
    for _ in range(3):
        weight = free(pool).double() + 1e-9
        pool = halves(pool, torch.multinomial(weight, 1, generator=generator).squeeze(1))
    pool.mix = 3 * torch.randn(pool.mix.shape, generator=generator, dtype=DOUBLE)
    loose = bound(problem, asked_of(problem, pool), pool).value
    improve(problem, None, pool, 10)
    assert (pool.bound >= loose - 1e-12).all() and (pool.bound > loose + 1e-3).any()
    box = problem.region.box
    share = torch.rand(10000, box.centre.shape[1], dtype=DOUBLE, generator=generator)
    points = box.centre + (2 * share - 1) * box.radius
    largest, z = problem.answers(points)[:, 0], before_units(problem, points)
    for d in range(len(pool)):
        inside = ((pool.sign[d] <= 0) | (z >= 0)).all(1) & ((pool.sign[d] >= 0) | (z <= 0)).all(1)
        assert not inside.any() or largest[inside].min() >= pool.bound[d]


@pytest.mark.parametrize("seed", range(4))
def test_the_integer_program_finds_the_exact_least_margin(seed):
    model = tiny(seed)
    x = torch.rand(2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    y = int(model(x.unsqueeze(0)).argmax())
    problem = problem_of(model, x.unsqueeze(0), y, LinfBall(0.4))
    lower, upper = (end.tolist() for end in LinfBall(0.4).box(x))
    exact = [m for j, m in enumerate(exact_margins(model, lower, upper, y, 3)) if j != y]
    for question, least in enumerate(exact):
        value, point = lowest(problem, question, 10)
        assert value == pytest.approx(least, abs=1e-4)
        assert problem.values(point.unsqueeze(0))[0, question].item() == pytest.approx(least, abs=1e-4)


@pytest.mark.parametrize("slope", [0.2, 0.1])
def test_a_leaky_slope_is_not_rounded_to_single_precision(slope):
    """By hand: 1000 * slope / 2 against the same and x less 1e-7, so that the margin at x = 1 is -1e-7 or less."""
    first, last = nn.Linear(1, 2).double(), nn.Linear(2, 2).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.0], [1.0]]))
        first.bias.copy_(torch.tensor([-0.5, 0.0]))
        last.weight.copy_(torch.tensor([[-1000.0, 0.0], [0.0, 1e-6]], dtype=DOUBLE))
        last.bias.copy_(torch.tensor([0.0, 500 * slope - 9e-7], dtype=DOUBLE))
    model = nn.Sequential(first, nn.LeakyReLU(slope), last).eval()
    assert model(torch.zeros(1, 1, dtype=DOUBLE)).argmax() == 0 and model(torch.ones(1, 1, dtype=DOUBLE)).argmax() == 1
    found = decide(model, torch.zeros(1, dtype=DOUBLE), 0, LinfBall(1.0), seconds=10)
    assert found.proven is False and found.bound <= -1e-7 + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_leaky_bounds_are_below_every_margin(seed):
    """On networks with weights of float32 and a slope that float32 does not hold."""
    torch.manual_seed(seed)
    layers = nn.Linear(2, 10), nn.LeakyReLU(0.1), nn.Linear(10, 10), nn.LeakyReLU(0.1), nn.Linear(10, 3)
    model = nn.Sequential(*layers).eval()
    x = torch.rand(2)
    exact = copy.deepcopy(model).double()
    y = int(exact(x.double().unsqueeze(0)).argmax())
    found = decide(model, x, y, LinfBall(0.005), seconds=10)
    steps = torch.linspace(-0.005, 0.005, 21, dtype=DOUBLE)
    points = (x.double() + torch.cartesian_prod(steps, steps)).clamp(0, 1)
    with torch.no_grad():
        logits = exact(points)
    margins = (logits[:, [y]] - logits)[:, [j for j in range(3) if j != y]]
    assert found.proven and found.bound <= margins.min()


def test_a_witness_lies_in_the_ball():
    """Balls that hold while the box around them does not; a corner of the box is no witness."""
    steps = torch.linspace(-1, 1, 121, dtype=DOUBLE)
    square = torch.cartesian_prod(steps, steps)
    disc, tried = square[square.norm(dim=1) <= 1], 0
    for seed in range(200):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)).double()
        for parameter in model.parameters():
            parameter.data *= 2.5
        x = 0.3 + 0.4 * torch.rand(2, dtype=DOUBLE)
        y = int(model(x.unsqueeze(0)).argmax())
        with torch.no_grad():
            broken = [(m := model(x + 0.25 * part))[:, y] <= m[:, 1 - y] for part in (disc, square)]
        if broken[0].any() or not broken[1].any():
            continue
        tried += 1
        found = decide(model.eval(), x, y, L2Ball(0.25), seconds=2)
        assert found.proven is not False or (found.witness.double() - x).norm() <= 0.25 + 1e-9
    assert tried >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_method_exact_publishes_no_more_than_was_proven(dtype, monkeypatch):
    """Bounds are found in double precision, and the nearest number of fewer bits may lie above them."""
    model = NETS["mlp"]().to(dtype)
    x, _ = images(3)
    y = model(x.to(dtype)).argmax(1)
    proven = [0.1, 1 / 3, 2 / 3]
    remaining = iter(proven)
    monkeypatch.setattr("certifiers.exact.decide", lambda *_: Outcome(True, next(remaining), None, 1))
    asked = torch.ones(3, 10, dtype=torch.bool).scatter(1, y[:, None], False)
    bounds = METHODS["exact"](model, x.to(dtype), y, LinfBall(0.01), asked).bounds
    for row, limit in zip(bounds, proven, strict=True):
        published = row[row.isfinite()].unique().item()
        assert limit - 2 * torch.finfo(dtype).eps < published <= limit


def test_what_is_rounded_down():
    double = torch.tensor([0.1, -0.1, 1e300, torch.inf, -torch.inf, torch.nan], dtype=DOUBLE)
    single = rounded_down(double, torch.float32)
    assert (single[:3].double() <= double[:3]).all() and single[2] == torch.finfo(torch.float32).max
    assert single[3] == torch.inf and single[4] == -torch.inf and single[5].isnan()  # which prove nothing
    assert torch.equal(rounded_down(single[:2], torch.float32), single[:2])
