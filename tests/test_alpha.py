"""CROWN with optimised slopes: a case by hand, soundness, and agreement with auto_LiRPA's."""

import time

import pytest
import torch
from torch import nn

from certifiers.attack import pgd
from certifiers.bounds import Region, margin_lower_bounds, propagate, trace
from certifiers.bounds.alpha import Ascent, alpha_margins, optimised_intervals
from certifiers.bounds.linear import crown_intervals
from certifiers.lirpa import margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from tests.nets import NETS, images
from tests.random_nets import SHAPE, random_net

USUAL = Ascent()
METHODS = ("ibp", "crown-ibp", "crown", "symbolic")


def bounds_of(model, x, y, threat, classes=None, ascent=USUAL):
    network = trace(model, tuple(x.shape[1:])).bind()
    with torch.no_grad():
        intervals = crown_intervals(network, propagate(network, Region.of(x, threat)), 512)
        classes = torch.ones(len(x), network.nodes[-1].shape[0], dtype=torch.bool) if classes is None else classes
        return alpha_margins(network, intervals, y, classes, ascent)


def test_the_best_slope_by_hand():
    """margin = relu(z) - z/2 for z = 3x - 1 in [-1, 2]: CROWN's slope 1 gives -1/2, the slope 1/2 the true 0."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3.0], [3.0]]))
        first.bias.copy_(torch.tensor([-1.0, 4.0]))  # the second unit is z + 5, stable
        last.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        last.bias.copy_(torch.tensor([0.0, -2.5]))
    model = nn.Sequential(first, nn.ReLU(), last).double().eval()
    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    assert margin_lower_bounds(model, x, y, LinfBall(0.5), "crown")[0, 1].item() == pytest.approx(-0.5)
    assert bounds_of(model, x, y, LinfBall(0.5), ascent=Ascent(iterations=40))[0, 1].item() == pytest.approx(
        0, abs=0.01
    )


@pytest.mark.parametrize(
    "seed, ball", [(seed, LinfBall(0.06) if seed % 4 else L2Ball(0.4)) for seed in (0, 2, 4, 6, 8, 12, 14, 16, 20, 22)]
)
def test_no_point_is_below_the_bounds_or_outside_the_boxes(seed, ball):
    model = random_net(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(3, *SHAPE, generator=generator), torch.arange(3) % model(torch.rand(1, *SHAPE)).shape[1]
    network = trace(model, SHAPE).bind()
    with torch.no_grad():
        crown = crown_intervals(network, propagate(network, Region.of(x, ball)), 512)
        boxes = optimised_intervals(network, crown, Ascent())
        bounds = bounds_of(model, x, y, ball)
        noise = torch.rand(300, *x.shape, generator=generator) * 2 - 1
        noise[150:] = noise[150:].sign()
        points = [ball.project(x, x + ball.eps * some) for some in noise]
    points += [pgd(model, x, y, ball, steps=20, restarts=2)]
    for point in points:
        with torch.no_grad():
            values = trace(model, SHAPE).bind(point).values
        margins = values[-1].gather(1, y[:, None]) - values[-1]
        assert (margins >= bounds - 1e-5 * margins.abs().amax().clamp(min=1)).all()
        for value, box in zip(values, boxes.boxes, strict=True):
            slack = 1e-5 * value.abs().amax().clamp(min=1)
            assert (value >= box.lower - slack).all() and (value <= box.upper + slack).all()
    for new, old in zip(boxes.boxes, crown.boxes, strict=True):
        assert (new.lower >= old.lower - 1e-4).all() and (new.upper <= old.upper + 1e-4).all()


@pytest.mark.parametrize("name", NETS)
def test_as_tight_as_auto_lirpa(name):
    """Positive margins may stop early, so compare what is left, and how many are proven."""
    model, (x, y) = NETS[name](dtype=torch.float64), images(4, dtype=torch.float64)
    y = model(x).argmax(1)
    threat = LinfBall(0.08)
    crown = margin_lower_bounds(model, x, y, threat, "crown").detach()
    ours = bounds_of(model, x, y, threat)
    theirs = margin_lower_bounds_lirpa(model, x, y, threat, "alpha-crown")
    others = torch.ones_like(ours, dtype=torch.bool).scatter(1, y[:, None], False)
    assert (ours >= crown - 1e-9).all()
    hard = others & (ours <= 0)
    assert ours[hard].mean() >= theirs[hard].mean() - 1e-3
    assert ((ours > 0) & others).sum() >= ((theirs > 0) & others).sum()
    assert ours[hard].mean() > crown[hard].mean() + 1e-4  # else this shows little


@pytest.mark.parametrize("name", NETS)
def test_only_the_classes_that_are_asked(name):
    model, (x, y) = NETS[name](dtype=torch.float64), images(5, dtype=torch.float64)
    threat = LinfBall(0.03)
    classes = torch.rand(5, 10, generator=torch.Generator().manual_seed(1)) < 0.3
    asked = classes.scatter(1, y[:, None], False)
    for method in METHODS:
        whole = margin_lower_bounds(model, x, y, threat, method)
        part = margin_lower_bounds(model, x, y, threat, method, classes=classes)
        assert asked.any() and torch.allclose(part[asked], whole[asked], atol=1e-9)
        assert (part[~asked.scatter(1, y[:, None], True)] == -torch.inf).all() and (
            part.gather(1, y[:, None]) == 0
        ).all()
    whole, part = bounds_of(model, x, y, threat), bounds_of(model, x, y, threat, classes)
    # Which boxes are optimised depends on what else is open, so a bound that is positive in one may stop elsewhere.
    assert torch.equal(part[asked] > 0, whole[asked] > 0)
    assert (part[~asked.scatter(1, y[:, None], True)] == -torch.inf).all()


def test_time_and_memory_change_no_more_than_they_should():
    model, (x, y) = NETS["conv"](dtype=torch.float64), images(4, dtype=torch.float64)
    threat = LinfBall(0.03)
    free = bounds_of(model, x, y, threat)
    small = bounds_of(model, x, y, threat, ascent=Ascent(memory_mb=0.01))
    assert torch.allclose(free, small, atol=1e-9)
    late = bounds_of(model, x, y, threat, ascent=Ascent(deadline=time.monotonic()))
    crown = margin_lower_bounds(model, x, y, threat, "crown")
    assert (late >= crown - 1e-9).all() and late.mean() < free.mean()


def test_slopes_outside_their_range_are_cut():
    """A slope of 2 or -1 would be unsound; backward cuts it."""
    from certifiers.bounds.nonlinear import ReLU
    from certifiers.bounds.operations import Interval

    box = Interval.between(torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    for given, used in ((2.0, 1.0), (-1.0, 0.0), (0.25, 0.25)):
        (rows,), constant = ReLU().backward(torch.ones(1, 1, 1), box, torch.full((1, 1, 1), given))
        assert rows.item() == used and constant.item() == 0.0
