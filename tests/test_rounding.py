"""Bounds hold in exact arithmetic, as fractions and double precision judge, also where plain bounds are false."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from certifiers import L2Ball, LinfBall, certify
from certifiers.bounds import Region, margin_lower_bounds, propagate, trace
from certifiers.bounds.nonlinear import ReLU
from certifiers.bounds.operations import Interval
from certifiers.bounds.rounding import Tally, between, gamma, single_is_single
from certifiers.errors import InputError
from certifiers.exact import decide
from certifiers.methods import METHODS, rounded_down
from certifiers.radius import certify_radii
from certifiers.verdict import Status

from .random_nets import CLASSES, SHAPE, random_net

BACKWARD = ("crown-ibp", "crown")


def absorbing(order: tuple[int, int, int], dtype: torch.dtype) -> nn.Module:
    """Logits ``big + 0.6`` against ``(x + 0.5) + big``: x alone decides, and adding it to ``big`` changes nothing.

    The margin is 0.1 - x, whatever the order of the three hidden units.
    """
    big = 2.0**24 if dtype == torch.float32 else 2.0**53
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).to(dtype)
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0], [1.0], [0.0]])[list(order)])
        net[0].bias.copy_(torch.tensor([big, 0.5, big], dtype=torch.float64)[list(order)])
        net[2].weight.copy_(weight[:, list(order)])
        net[2].bias.copy_(torch.tensor([0.6, 0.0]))
    return net.eval()


def exact_margin(net: nn.Module, x: Fraction) -> Fraction:
    """The margin of a network of one input, two layers and two classes, in rational arithmetic."""
    values = [x]
    for layer in net:
        if isinstance(layer, nn.ReLU):
            values = [max(value, Fraction(0)) for value in values]
            continue
        values = [
            sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
            for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]
    return values[0] - values[1]


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_bounds_claim_what_is_false_and_ours_do_not(dtype):
    x, y, threat = torch.tensor([[0.1]], dtype=dtype), torch.tensor([0]), LinfBall(0.2)
    fooled = 0
    for order, method in itertools.product(ORDERS, ("ibp", "crown-ibp", "crown")):
        net = absorbing(order, dtype)
        assert exact_margin(net, Fraction(3, 10)) < 0 < exact_margin(net, Fraction(0))
        plain = margin_lower_bounds(net, x, y, threat, method)[0, 1]
        fooled += bool(plain > 0)
        assert margin_lower_bounds(net, x, y, threat, method, account_for_rounding=True)[0, 1] <= 0
    assert fooled > 0  # else this shows nothing


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown", "exact"])
def test_no_method_certifies_it(method):
    """Where single precision is not enough, double precision decides, and finds that it is not robust."""
    x, y, classes = torch.tensor([[0.1]]), torch.tensor([0]), torch.tensor([[False, True]])
    for order in ORDERS:
        found = METHODS[method](absorbing(order, torch.float32), x, y, LinfBall(0.2), classes, None)
        assert not (getattr(found, "bounds", found)[0, 1] > 0)


def test_the_cascade_does_not_certify_it_although_no_attack_sees_it():
    x, y = torch.tensor([[0.05]]), torch.tensor([0])
    nets = [absorbing(order, torch.float32) for order in ORDERS]
    right = [net for net in nets if int(net(x).argmax()) == 0]
    assert right  # single precision itself predicts class 0 for some
    for net in right:
        (verdict,) = certify(net, x, y, LinfBall(0.2), ["ibp", "crown", "exact"], attack_steps=10, input_seconds=5)
        assert verdict.status is not Status.certified


def test_the_complete_search_is_not_fooled_by_double_precision_either():
    for order in ORDERS:
        outcome = decide(absorbing(order, torch.float64), torch.tensor([0.1]), 0, LinfBall(0.2), seconds=5)
        assert outcome.proven is not True


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["ibp", *BACKWARD])
def test_bounds_of_a_single_input_stay_below_its_margin(seed, method):
    """Where only one input is allowed, the bound in exact arithmetic is its margin, as double precision gives it."""
    net, x, y = some(seed)
    wide = copy.deepcopy(net).double()
    logits = wide(x.double())
    margins = logits.gather(1, y[:, None]) - logits
    bounds = margin_lower_bounds(net, x, y, LinfBall(0.0), method, account_for_rounding=True)
    others = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], False)
    assert (bounds.double() < margins)[others].all()
    assert (margins - bounds)[others].max() < 1e-2 * (1 + logits.abs().max())  # and not far below


def test_single_inputs_do_tell_plain_bounds_apart():
    above = 0
    for seed in range(20):
        net, x, y = some(seed)
        logits = copy.deepcopy(net).double()(x.double())
        plain = margin_lower_bounds(net, x, y, LinfBall(0.0), "crown-ibp").double()
        above += int((plain > logits.gather(1, y[:, None]) - logits).sum())
    assert above > 20


def some(seed):
    torch.manual_seed(seed)
    return random_net(seed), torch.rand(4, *SHAPE), torch.randint(CLASSES, (4,))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threat", [LinfBall(0.05), L2Ball(0.5)], ids=lambda threat: threat.norm)
def test_boxes_hold_those_of_double_precision(seed, threat):
    """Interval arithmetic is monotone, so single precision's boxes must hold double precision's."""
    net, x, _ = some(seed)
    wide = copy.deepcopy(net).double()
    boxes = propagate(trace(net, SHAPE).bind(), Region.of(x, threat, True), True).boxes
    exact = propagate(trace(wide, SHAPE).bind(), Region.of(x.double(), threat)).boxes
    for box, true in zip(boxes, exact, strict=True):
        assert (box.lower.double() <= true.lower).all()
        assert (box.upper.double() >= true.upper).all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threat", [LinfBall(0.03), L2Ball(0.3)], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("method", BACKWARD)
def test_no_input_of_the_region_is_below(seed, threat, method):
    net, x, y = some(seed)
    bounds = margin_lower_bounds(net, x, y, threat, method, account_for_rounding=True).double()
    wide = copy.deepcopy(net).double()
    lower, upper = threat.box(x.double())
    for _ in range(20):
        corner = torch.where(torch.rand_like(lower) < 0.5, lower, upper)
        point = threat.project(x.double(), corner)
        logits = wide(point)
        assert (logits.gather(1, y[:, None]) - logits >= bounds).all()


def test_the_loss_is_the_textbook_bound_by_hand():
    """One linear layer, 3 products and a bias: |fl - exact| <= gamma(4) (|W| |x| + |b|)."""
    net = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0, 4.0], [0.5, 0.5, 0.5]]))
        net[0].bias.copy_(torch.tensor([1.0, -3.0]))
    x = torch.tensor([[0.5, 0.25, 1.0]])
    intervals = propagate(trace(net, (3,)).bind(), Region.of(x, LinfBall(0.0), True), True)
    reach = torch.tensor([[1 * 0.5 + 2 * 0.25 + 4 * 1.0 + 1, 0.25 + 0.125 + 0.5 + 3]])
    torch.testing.assert_close(intervals.reach[-1], reach, rtol=1e-5, atol=0)
    unit = 2.0**-24
    widening = intervals.boxes[-1].radius
    assert (widening >= 4 * unit * reach).all()
    assert (widening <= 40 * unit * reach).all()


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_relaxations_hold_in_rational_arithmetic(slope):
    """The rounded chord and its constant, less the loss, stay below -relu at both ends of the box."""
    torch.manual_seed(0)
    lower = -torch.rand(500, 1) * 10 ** torch.randint(-4, 4, (500, 1)).float()
    upper = torch.rand(500, 1) * 10 ** torch.randint(-4, 4, (500, 1)).float()
    box = between(lower, upper)
    row = -torch.rand(500, 1, 1) - 0.1
    operation = ReLU(slope)
    reach = [box.centre.abs() + box.radius] * 2
    tally = Tally((None, operation), reach)
    tally.carried(1, row)
    (part,), constant = operation.backward(row, box)
    tally.passed(1, (0,), constant, {})
    tally.carried(0, part)
    loss = tally.loss(constant)
    missed = 0
    leak = Fraction(slope)
    for k in range(500):
        a, c, p = (Fraction(v.flatten()[k].item()) for v in (row, constant, part))
        for end in (Fraction(lower[k].item()), Fraction(upper[k].item())):
            true = a * max(end, leak * end)
            missed += p * end + c > true
            assert p * end + c - Fraction(loss.flatten()[k].item()) <= true
    assert missed > 0  # without the loss it does not always hold


def test_ends_are_read_outside_what_they_hold():
    torch.manual_seed(0)
    lower = torch.randn(10_000) * 10 ** torch.randint(-6, 6, (10_000,)).float()
    upper = lower + torch.rand(10_000) * 10 ** torch.randint(-6, 6, (10_000,)).float()
    box = between(lower, upper)
    assert (box.lower <= lower).all() and (box.upper >= upper).all()
    plain = Interval.between(lower, upper)
    assert (plain.lower > lower).any()


def test_gamma_is_at_least_the_textbooks_and_gives_up_where_that_means_nothing():
    unit = 2.0**-24
    assert gamma(100, torch.float32) >= 100 * unit / (1 - 100 * unit)
    assert gamma(10**7, torch.float32) == float("inf")
    assert gamma(10**7, torch.float64) < 1e-8


def test_numbers_beyond_the_range_prove_nothing():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1e15)
        net[2].bias[0] = 1e38
    bounds = margin_lower_bounds(
        net, torch.full((1, 2), 0.5), torch.tensor([0]), LinfBall(0.1), "crown", account_for_rounding=True
    )
    assert not bounds[0, 1] > 0


def test_symbolic_does_not_claim_to_account_for_rounding():
    net, x, y = some(0)
    with pytest.raises(InputError, match="take ibp, crown-ibp or crown"):
        margin_lower_bounds(net, x, y, LinfBall(0.1), "symbolic", account_for_rounding=True)


def test_double_precision_settles_what_single_cannot():
    """A margin of 5e-5, less than single precision may lose, is certified all the same."""
    net = nn.Sequential(nn.Linear(2, 400), nn.ReLU(), nn.Linear(400, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        net[0].bias.fill_(3.0)
        net[2].weight[1] = net[2].weight[0]
        net[2].bias.copy_(torch.tensor([5e-5, 0.0]))
    x, y, classes = torch.full((1, 2), 0.5), torch.tensor([0]), torch.tensor([[False, True]])
    assert margin_lower_bounds(net, x, y, LinfBall(0.1), "crown", account_for_rounding=True)[0, 1] < 0
    assert METHODS["crown"](net, x, y, LinfBall(0.1), classes, None).bounds[0, 1] > 0


def test_rounding_down_never_rounds_up():
    torch.manual_seed(0)
    wide = torch.randn(10_000, dtype=torch.float64)
    narrow = rounded_down(wide, torch.float32)
    assert (narrow.double() < wide).all()
    assert (wide - narrow).max() < 1e-6


def test_the_constants_of_relaxations_are_sums_of_many_terms():
    """A thousand of one sign in one sum: it may be off by gamma(1000) of itself."""
    tally = Tally((None, ReLU()), [torch.ones(1, 1000), torch.ones(1, 1000)])
    tally.passed(1, (0,), torch.full((1, 1), -50.0), {})
    assert tally.loss(torch.zeros(1, 1)).item() >= 1000 * 2.0**-24 * 50


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_where_single_precision_is_not_itself_double_precision_is_used(method):
    net, x, y = some(0)
    y = net(x).argmax(1)
    classes = torch.ones(4, CLASSES, dtype=torch.bool).scatter(1, y[:, None], False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = METHODS[method](net, x, y, LinfBall(0.001), classes, None)
        radii = certify_radii(net, x, y, "linf", method, largest=0.01, tolerance=0.005, attack_steps=2)
        statuses = [v.status for v in certify(net, x, y, LinfBall(0.001), method, attack_steps=2)]
    finally:
        torch.set_float32_matmul_precision(before)
    plain = METHODS[method](net, x, y, LinfBall(0.001), classes, None)
    gain = (getattr(found, "bounds", found) - getattr(plain, "bounds", plain))[classes]
    assert gain.dtype == net[-1].weight.dtype == torch.float32
    assert (gain > 0).all()  # double precision takes off far less
    assert len(radii) == 4
    assert statuses == [v.status for v in certify(net, x, y, LinfBall(0.001), method, attack_steps=2)]


def test_single_precision_is_doubted_where_a_processor_is_asked_for_fewer_bits(monkeypatch):
    cpu = torch.device("cpu")
    assert single_is_single(cpu) and not single_is_single(torch.device("cuda"))
    with monkeypatch.context() as asked:
        asked.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        assert not single_is_single(cpu)
    place = getattr(torch.backends.mkldnn, "conv", None)
    if hasattr(place, "fp32_precision"):
        before = place.fp32_precision
        try:
            place.fp32_precision = "bf16"
            assert not single_is_single(cpu)
        finally:
            place.fp32_precision = before
    assert single_is_single(cpu)


def test_a_leaf_whose_bound_is_no_number_is_not_proven(monkeypatch):
    from certifiers.exact import tree

    monkeypatch.setattr(tree, "_leaf", lambda problem, leaf: (float("nan"), None))
    pool = tree.Domains(*(torch.ones(1, 1) for _ in range(8)))
    assert tree._without_leaves(None, pool, None)[2] <= 0


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_what_underflows_is_not_lost(method):
    """0.6 * 1e-25 * 1e-25 is 0 in single precision, and 1e25 * 1e25 brings it back in exact arithmetic."""
    layers = [nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)]
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    for layer, weight in zip(layers[::2], ([[1e-25]], [[1e-25]], [[1e25]], [[-1e25], [0.0]]), strict=True):
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.zero_()
    net[-1].bias[0] = 0.5
    assert (copy.deepcopy(net).double()(torch.tensor([[0.9]]).double()) @ torch.tensor([1.0, -1.0]).double()) < -0.3
    (found,) = certify(net, torch.tensor([[0.6]]), torch.tensor([0]), LinfBall(0.35), method, attack_steps=0)
    assert found.status is Status.unknown


def test_a_leaf_counts_in_what_is_proven(monkeypatch):
    from certifiers.exact import tree

    for name, value in {"ROOT_STEPS": 0, "STEPS": 0, "FEW_UNITS": -1}.items():
        monkeypatch.setattr(tree, name, value)
    leaf, leaves = tree._leaf, []
    monkeypatch.setattr(tree, "_leaf", lambda *given: leaves.append(leaf(*given)) or leaves[-1])
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101).double()] * 2)
    for seed in range(6):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter *= 3
        logits = net(grid)
        net[2].bias[0] += 0.02 - (logits[:, 0] - logits[:, 1]).min()
        found = decide(net, torch.full((2,), 0.5).double(), 0, LinfBall(0.5), 5.0)
        logits = net(grid)
        assert found.bound <= (logits[:, 0] - logits[:, 1]).min() + 1e-9
    assert leaves
