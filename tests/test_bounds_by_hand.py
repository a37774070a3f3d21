"""Bounds worked out by hand on networks small enough for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from certifiers.bounds import METHODS, Region, fused_cross_entropy, margin_lower_bounds, propagate, trace
from certifiers.errors import InputError
from certifiers.threat import L2Ball, LinfBall


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None).double()
    layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


def two_layers(activation: nn.Module) -> nn.Module:
    # h = (x1 + x2 - 1, x1 - x2); logits = (act(h1) - act(h2), 0.5)
    return nn.Sequential(linear([[1, 1], [1, -1]], [-1, 0]), activation, linear([[1, -1], [0, 0]], [0, 0.5])).eval()


X = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
Y0, Y1 = torch.tensor([0]), torch.tensor([1])


def test_interval_bounds_of_two_layers():
    # x in [.4, .6]^2: h1 and h2 in [-.2, .2], after ReLU in [0, .2]; logit 0 in [-.2, .2].
    model = two_layers(nn.ReLU())
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), "ibp").tolist() == [[0.0, pytest.approx(-0.7)]]
    assert margin_lower_bounds(model, X, Y1, LinfBall(0.1), "ibp").tolist() == [[pytest.approx(0.3), 0.0]]


@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
def test_crown_of_two_layers(method):
    # Units in [-.2, .2]: chord .5 h + .1; u = -l, so the lower slope is 0.
    # logit 0 - .5 >= 0 * h1 - (.5 h2 + .1) - .5, and h2 <= .2: -.7.
    # .5 - logit 0 >= .5 - (.5 h1 + .1) + 0, and h1 <= .2: .3.
    model = two_layers(nn.ReLU())
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(-0.7)
    assert margin_lower_bounds(model, X, Y1, LinfBall(0.1), method)[0, 0].item() == pytest.approx(0.3)


def test_crown_takes_the_slope_of_smaller_area():
    # x = (.6, .5), eps .1: h1 in [-.1, .3] and h2 in [-.1, .3]; u > -l, so the lower slope is 1.
    # logit 0 - .5 >= h1 - (.75 h2 + .075) - .5 = .25 x1 + 1.75 x2 - 1.575 >= .125 + .7 - 1.575 = -.75.
    x = torch.tensor([[0.6, 0.5]], dtype=torch.float64)
    got = margin_lower_bounds(two_layers(nn.ReLU()), x, Y0, LinfBall(0.1), "crown")
    assert got[0, 1].item() == pytest.approx(-0.75)


def test_leaky_relu():
    # Slope .5 below 0: units in [-.2, .2] map to [-.1, .2]; chord .75 h + .05, lower slope .5.
    model = two_layers(nn.LeakyReLU(0.5))
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), "ibp")[0, 1].item() == pytest.approx(-0.8)
    # .5 h1 - (.75 h2 + .05) - .5 = -.25 x1 + 1.25 x2 - 1.05 >= -.15 + .5 - 1.05
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), "crown")[0, 1].item() == pytest.approx(-0.7)


def test_stable_units_are_exact():
    # Far from zero both ReLUs are linear or zero; the bound is the exact minimum.
    model = nn.Sequential(linear([[1, 1], [1, 1]], [5, -5]), nn.ReLU(), linear([[1, 1], [0, 0]])).eval()
    for method in ("crown-ibp", "crown"):
        assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(5.8)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_linear_network_under_both_norms(method):
    # logit 0 - logit 1 = 3 x1 - 4 x2 + 1 at (.5, .5): .5; linf: -7 eps; l2: -5 eps.
    model = nn.Sequential(linear([[3, -4], [0, 0]], [1, 0])).eval()
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(0.5 - 0.7)
    assert margin_lower_bounds(model, X, Y0, L2Ball(0.1), method)[0, 1].item() == pytest.approx(0.5 - 0.5)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_the_box_is_cut_to_the_pixel_range(method):
    # x = (0, 1), eps .5: x1 in [0, .5], x2 in [.5, 1]: 3 x1 - 4 x2 >= -4, where an uncut box would give -7.5.
    model = nn.Sequential(linear([[3, -4], [0, 0]])).eval()
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert margin_lower_bounds(model, x, Y0, LinfBall(0.5), method)[0, 1].item() == pytest.approx(-4.0)
    assert margin_lower_bounds(model, x, Y0, L2Ball(0.5), method)[0, 1].item() >= -4.0


def test_convolution_and_average_pooling():
    # One 2x2 kernel (1, -1; 1, -1) on a 2x2 image, then twice the mean: (a - b + c - d) * 2.
    conv = nn.Conv2d(1, 2, 2, bias=False).double()
    conv.weight.data = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]).double()
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear([[2, 0], [0, 1]])).eval()
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    assert margin_lower_bounds(model, x, Y0, LinfBall(0.1), "ibp")[0, 1].item() == pytest.approx(-0.8)
    assert margin_lower_bounds(model, x, Y0, L2Ball(0.1), "crown")[0, 1].item() == pytest.approx(-0.4)


def test_max_pooling():
    # The maximum of 4 pixels; one is ahead by more than the box is wide, so max = that pixel, exactly.
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), linear([[1], [0]])).eval()
    ahead = torch.tensor([[[[0.9, 0.1], [0.2, 0.3]]]], dtype=torch.float64)
    close = torch.tensor([[[[0.5, 0.45], [0.2, 0.3]]]], dtype=torch.float64)
    for method in ("ibp", "crown-ibp", "crown"):
        assert margin_lower_bounds(model, ahead, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(0.8)
        assert margin_lower_bounds(model, close, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(0.4)
        # Upwards: -max >= -(largest upper end).
        assert margin_lower_bounds(model, close, Y1, LinfBall(0.1), method)[0, 0].item() == pytest.approx(-0.6)


class Chosen(nn.Module):
    """The features ``places`` of a flat input."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor(places))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.places)


@pytest.mark.parametrize("method", METHODS)
def test_selected_features(method):
    # x3 and x1 of (x1, x2, x3), in this order: 3 x3 - 4 x1 + 1 at (.5, .5): .5; linf: -7 eps; l2: -5 eps.
    model = nn.Sequential(Chosen([2, 0]), linear([[3, -4], [0, 0]], [1, 0])).eval()
    x = torch.tensor([[0.5, 0.1, 0.5]], dtype=torch.float64)
    assert margin_lower_bounds(model, x, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(0.5 - 0.7)
    assert margin_lower_bounds(model, x, Y0, L2Ball(0.1), method)[0, 1].item() == pytest.approx(0.5 - 0.5)
    # At x3 = .95 the pixel range cuts its box to [.85, 1]: 3 * .85 - 4 * .6 + 1.
    x[0, 2] = 0.95
    assert margin_lower_bounds(model, x, Y0, LinfBall(0.1), method)[0, 1].item() == pytest.approx(1.15)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = linear([[1.0], [0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(x) - x)


def test_residual_connections_cancel_in_linear_bounds():
    # relu(x) - x on x in [.4, .6]: exactly 0. Linear bounds see the same x twice, intervals cannot.
    x = torch.tensor([[0.5]], dtype=torch.float64)
    assert margin_lower_bounds(Skip().eval(), x, Y0, LinfBall(0.1), "ibp")[0, 1].item() == pytest.approx(-0.2)
    assert margin_lower_bounds(Skip().eval(), x, Y0, LinfBall(0.1), "crown")[0, 1].item() == pytest.approx(0.0)


def test_margins_merge_the_last_layer():
    # Logits (h, h): each in [-1, 1] by itself, but their difference is exactly 0.
    model = nn.Sequential(linear([[2.0, 0.0]]), linear([[1.0], [1.0]])).eval()
    assert margin_lower_bounds(model, X, Y0, LinfBall(0.5), "ibp")[0, 1].item() == pytest.approx(0.0)


def test_fused_loss_of_a_linear_network():
    # m = logit 1 - logit 0 in [-1.2, .2]: the chord at its upper end is exp(.2), so the bound is exact.
    model = nn.Sequential(linear([[3, -4], [0, 0]], [1, 0])).eval()
    got = fused_cross_entropy(model, X, Y0, LinfBall(0.1)).item()
    assert got == pytest.approx(math.log1p(math.exp(0.2)))


def test_boxes_of_every_node():
    model = two_layers(nn.ReLU())
    boxes = propagate(trace(model, (2,)).bind(), Region.of(X, LinfBall(0.1))).boxes
    assert [b.lower.flatten().tolist() for b in boxes] == [
        pytest.approx([0.4, 0.4]), pytest.approx([-0.2, -0.2]), pytest.approx([0, 0]), pytest.approx([-0.2, 0.5])
    ]  # fmt: skip
    assert [b.upper.flatten().tolist() for b in boxes][1:] == [
        pytest.approx([0.2, 0.2]), pytest.approx([0.2, 0.2]), pytest.approx([0.2, 0.5])
    ]  # fmt: skip


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("method", METHODS)
def test_labels_of_every_integer_type(method, dtype):
    """Bytes would be a mask where they index, and as many classes as samples would hide it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    x, y, asked = torch.rand(3, 2).double(), torch.tensor([1, 0, 2]), torch.eye(3).roll(1, 1).bool()
    for classes in (None, asked):
        expected = margin_lower_bounds(model, x, y, LinfBall(0.1), method, classes=classes)
        assert torch.equal(margin_lower_bounds(model, x, y.to(dtype), LinfBall(0.1), method, classes=classes), expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_fused_loss_takes_labels_of_every_integer_type(dtype):
    model = two_layers(nn.ReLU())
    x, y = X.expand(2, 2), torch.tensor([1, 0])
    expected = fused_cross_entropy(model, x, y, LinfBall(0.1))
    assert torch.equal(fused_cross_entropy(model, x, y.to(dtype), LinfBall(0.1)), expected)


@pytest.mark.parametrize("y", [torch.tensor([True]), torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor(0)])
def test_labels_that_are_no_class_numbers(y):
    for bound in (margin_lower_bounds, fused_cross_entropy):
        with pytest.raises(InputError, match="Labels must be a tensor of integer class numbers"):
            bound(two_layers(nn.ReLU()), X, y, LinfBall(0.1))
