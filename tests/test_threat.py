import math

import pytest
import torch

from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall, check_inputs, threat

BALLS = [LinfBall(0.1), L2Ball(0.1)]


@pytest.mark.parametrize("ball", BALLS)
def test_box_is_cut_to_the_pixel_range_and_not_to_the_images(ball):
    lower, upper = ball.box(torch.tensor([[0.0, 0.05, 0.5, 0.95]], dtype=torch.float64))
    assert torch.allclose(lower, torch.tensor([[0.0, 0.0, 0.4, 0.85]], dtype=torch.float64), atol=1e-15)
    assert torch.allclose(upper, torch.tensor([[0.1, 0.15, 0.6, 1.0]], dtype=torch.float64), atol=1e-15)


def test_radius_0_is_the_clean_input_alone():
    x = torch.rand(2, 3)
    for ball in (LinfBall(0), L2Ball(0.0)):
        lower, upper = ball.box(x)
        assert torch.equal(lower, x) and torch.equal(upper, x)
        assert torch.allclose(ball.project(x, torch.rand(2, 3)), x, atol=1e-6)


def test_eps_may_be_a_tensor_that_gradients_reach():
    eps = torch.tensor(0.1, requires_grad=True)
    lower, upper = LinfBall(eps).box(torch.tensor([[0.5, 0.05]]))
    (upper - lower).sum().backward()
    assert eps.grad == 3.0  # twice for the first pixel, once for the second, whose lower end is cut off


def test_linf_projection_by_hand():
    x = torch.tensor([[0.5, 0.95, 0.0]], dtype=torch.float64)
    moved = LinfBall(0.1).project(x, torch.tensor([[0.9, 1.2, -0.3]], dtype=torch.float64))
    assert torch.allclose(moved, torch.tensor([[0.6, 1.0, 0.0]], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize(
    "x, x_adv, expected",
    [
        ([0.5, 0.5], [3.5, 4.5], [0.65, 0.7]),  # 3-4-5: a quarter of the way along (0.6, 0.8)
        ([1.0, 0.5], [1.3, 0.9], [1.0, 0.7]),  # then cut to 1
        ([0.0, 0.5], [-3.0, 0.5], [0.0, 0.5]),  # straight out of the range: nothing is left
        ([0.5, 0.5], [0.6, 0.4], [0.6, 0.4]),  # inside: stays put
    ],
)
def test_l2_projection_by_hand(x, x_adv, expected):
    start, moved = torch.tensor([x], dtype=torch.float64), torch.tensor([x_adv], dtype=torch.float64)
    found = L2Ball(0.25).project(start, moved)
    assert torch.allclose(found, torch.tensor([expected], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("ball", [LinfBall, L2Ball])
def test_projections_end_inside(ball, eps):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 3, 8, 8, generator=generator)
    x[:100] = x[:100].round()  # corners of the pixel range
    x_adv = x + torch.randn(x.shape, generator=generator) * torch.logspace(-3, 1, 300).view(-1, 1, 1, 1)
    found = ball(eps).project(x, x_adv)
    # l2 needs no tolerance at all; x + eps itself is rounded in linf.
    assert ball(eps).contains(x, found, tolerance=0.0 if ball is L2Ball else 1e-7).all()
    assert torch.equal(ball(eps).project(x, found), found)


def test_contains_by_hand():
    x = torch.full((1, 4), 0.5)
    assert LinfBall(0.1).contains(x, x + 0.1)
    assert not LinfBall(0.1).contains(x, x + torch.tensor([0.0, 0.0, 0.0, 0.101]))
    assert L2Ball(0.2).contains(x, x + 0.1)  # sqrt(4 * 0.01)
    assert not L2Ball(0.199).contains(x, x + 0.1)
    for ball in (LinfBall(1.0), L2Ball(2.0)):
        assert not ball.contains(x, x + torch.tensor([0.0, 0.0, 0.0, 0.51]))  # beyond 1
        assert not ball.contains(x, x - torch.tensor([0.0, 0.0, 0.0, 0.51]))  # beyond 0
        assert not ball.contains(x, x * math.nan)


def test_threat_by_name():
    assert threat("linf", 0.3) == LinfBall(0.3)
    assert threat("l2", 0.3) == L2Ball(0.3)
    assert (LinfBall(0.3).norm, L2Ball(0.3).norm) == ("linf", "l2")
    with pytest.raises(InputError, match="linf, l2"):
        threat("l1", 0.3)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf, "0.1", True, None, torch.zeros(2)])
@pytest.mark.parametrize("ball", [LinfBall, L2Ball])
def test_bad_radius(ball, eps):
    with pytest.raises(InputError, match="eps must be"):
        ball(eps)


X, Y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])


def test_good_inputs_pass():
    check_inputs(X, Y, 2)
    check_inputs(torch.tensor([[0.0, 1.0]]), torch.tensor([9], dtype=torch.uint8), 10)


@pytest.mark.parametrize(
    "x, y, says",
    [
        (X * 255, Y, "range from 127.5 to 127.5.*normalisation"),
        (X - 0.6, Y, "range from -0.1 to -0.1.*pixel units"),
        (X * math.nan, Y, "NaN"),
        (X * math.inf, Y, "NaN or infinite"),
        (X.to(torch.uint8), Y, "floating-point.*uint8"),
        (X[0, 0, 0], Y, "shape"),
        (X, Y.float(), "integer class numbers.*float32"),
        (X, Y.bool(), "integer class numbers.*bool"),
        (X, Y[:, None], "integer class numbers"),
        (X, Y[:1], "2 inputs came with 1 labels"),
        (X, Y + 1, "from 0 to 1.*from 1 to 2"),
        (X, Y - 1, "from 0 to 1.*from -1 to 0"),
    ],
)
def test_bad_inputs(x, y, says):
    with pytest.raises(InputError, match=says):
        check_inputs(x, y, 2)
