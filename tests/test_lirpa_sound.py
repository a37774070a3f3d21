"""auto_LiRPA's bounds are never above a margin that some point has, whatever the layers, or they are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certifiers import certify
from certifiers.errors import UnsupportedLayer
from certifiers.lirpa import METHODS, margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall
from tests.attacked import DOUBLE, Calls, behind, least_margins
from tests.nets import NETS, images

THREATS = {"linf": LinfBall(0.05), "l2": L2Ball(0.4)}


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3]).view(1, 1, 1))
        self.register_buffer("std", torch.tensor([0.2]).view(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", NETS)
def test_bounds_are_sound_and_in_order(name, norm):
    model = NETS[name](seed=1, dtype=DOUBLE)
    x, y = images(4, seed=1, dtype=DOUBLE)
    least = least_margins(model, x, y, THREATS[norm])
    bounds = {m: margin_lower_bounds_lirpa(model, x, y, THREATS[norm], m, iterations=6).detach() for m in METHODS}
    for method, bound in bounds.items():
        assert bound.shape == (4, 10) and bound.dtype == DOUBLE
        assert (bound.gather(1, y[:, None]) == 0).all()
        assert (bound <= least + 1e-9).all(), method
    assert bounds["ibp"].mean() < bounds["crown-ibp"].mean() <= bounds["crown"].mean()
    assert (bounds["alpha-crown"] >= bounds["crown"] - 1e-9).all()


FIRSTS = {
    "normalise": Normalise,
    "scale": lambda: Calls(lambda x: x * 3 + 1),
    "relu": nn.ReLU,
    "batchnorm": lambda: nn.BatchNorm2d(1),
}


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("first", FIRSTS)
def test_whatever_meets_the_input_first(first, norm):
    """auto_LiRPA alone takes an l2 ball for the clean image here, and stops at normalisation."""
    model = behind(FIRSTS[first]())
    x, y = images(3, dtype=DOUBLE)
    y = y % 4
    least = least_margins(model, x, y, THREATS[norm])
    for method in ("ibp", "crown-ibp", "crown"):
        bound = margin_lower_bounds_lirpa(model, x, y, THREATS[norm], method).detach()
        assert (bound <= least + 1e-9).all(), method
        assert (least - bound).mean() < 20, method


MIDDLES = {
    "groups": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "dilation": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=1),
    "sides": lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)),
    "pool": lambda: nn.AvgPool2d(2),
    "overlap": lambda: nn.AvgPool2d(2, 1),
    "padded pool": lambda: nn.AvgPool2d(2, 2, 1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "power": lambda: Calls(lambda x: x**2),
    "tanh": nn.Tanh,
    "leaky": lambda: nn.LeakyReLU(0.1),
}
MAY_BE_REFUSED = {"overlap", "padded pool", "power"}


@pytest.mark.parametrize("middle", MIDDLES)
def test_layers_are_sound_or_refused(middle):
    """Groups, dilation, overlapping pools and powers are among those that some version bounds wrongly."""
    model = behind(nn.Identity(), MIDDLES[middle]())
    for parameter in model.parameters():
        parameter.data *= 1.5
    x, y = images(3, seed=2, dtype=DOUBLE)
    y = y % 4
    least = least_margins(model, x, y, LinfBall(0.1))
    for method in ("ibp", "crown-ibp", "crown"):
        try:
            bound = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), method).detach()
        except UnsupportedLayer:
            assert middle in MAY_BE_REFUSED and method != "ibp"
        else:
            assert (bound <= least + 1e-9).all(), method


def test_dropout_is_nothing_in_eval_mode():
    """auto_LiRPA alone would trace a network with dropout in training mode, BatchNorm included."""
    plain = behind(nn.Identity(), nn.Sequential(nn.BatchNorm2d(3), nn.Identity()))
    models = [plain, copy.deepcopy(plain)]
    models[1][3][1] = nn.Dropout(0.5).eval()
    before = copy.deepcopy(models[1].state_dict())
    x, y = images(3, dtype=DOUBLE)
    for method in ("ibp", "crown"):
        assert torch.equal(*(margin_lower_bounds_lirpa(m, x, y % 4, LinfBall(0.02), method) for m in models))
    assert all(torch.equal(before[key], value) for key, value in models[1].state_dict().items())


def dense(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution without groups or dilation: zeros between the weights."""
    channels, (rate, _), size = conv.in_channels, conv.dilation, conv.kernel_size[0]
    whole = nn.Conv2d(channels, conv.out_channels, rate * (size - 1) + 1, padding=conv.padding).to(DOUBLE)
    whole.weight.data.zero_()
    group_in, group_out = channels // conv.groups, conv.out_channels // conv.groups
    for out in range(conv.out_channels):
        first = out // group_out * group_in
        whole.weight.data[out, first : first + group_in, ::rate, ::rate] = conv.weight.data[out]
    whole.bias.data = conv.bias.data
    return whole


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("middle", ["groups", "dilation"])
def test_groups_and_dilation_equal_a_dense_convolution(middle, norm):
    """auto_LiRPA's fast mode for convolutions gives other bounds, which are wrong."""
    model = behind(nn.Identity(), MIDDLES[middle]())
    plain = copy.deepcopy(model)
    plain[3] = dense(model[3]).eval()
    x, y = images(3, seed=3, dtype=DOUBLE)
    assert torch.allclose(plain(x), model(x), atol=1e-12)
    for method in METHODS:
        bounds = [margin_lower_bounds_lirpa(m, x, y % 4, THREATS[norm], method, 3) for m in (model, plain)]
        assert (bounds[0] - bounds[1]).abs().max() < (1e-4 if method == "alpha-crown" else 1e-9), method


def test_functional_spelling():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3, stride=2), nn.Linear(27, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv((x - 0.5) / 0.25))
            return self.head(F.dropout(x.view(x.size(0), -1), 0.5, self.training))

    torch.manual_seed(0)
    model = Functional().to(DOUBLE).eval()
    x, y = images(3, dtype=DOUBLE)
    least = least_margins(model, x, y, LinfBall(0.05))
    for method in METHODS:
        bound = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.05), method, iterations=2).detach()
        assert (bound <= least + 1e-9).all()


class Narrow(nn.Module):
    """One number in the middle: with an input of one pixel v = 1.6 x + 0.3, and the margin of 0 over 1 is f(v)."""

    def __init__(self, function, sign: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(1, 1), nn.Linear(1, 2), function
        self.first.weight.data.fill_(1.6)
        self.first.bias.data.fill_(0.3)
        self.last.weight.data, self.last.bias.data = torch.tensor([[sign], [0.0]]), torch.zeros(2)
        self.register_buffer("two", torch.tensor([2.0]))
        self.three = nn.Parameter(torch.tensor([3.0]))
        self.to(DOUBLE).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


ALL, LINEAR = METHODS, METHODS[1:]
UNSOUND = {
    "slope above 1": (lambda s, v: F.leaky_relu(v - 1, 1.5), ALL, "LeakyRelu .* slope 1.5 is not from 0 to 1"),
    "slope below 0": (lambda s, v: F.leaky_relu(v - 1, -0.5), ALL, "LeakyRelu .* slope -0.5 is not from 0 to 1"),
    "reciprocal": (lambda s, v: 1 / (v - 5), ALL, "Reciprocal .* divides by depends on the input"),
    "reciprocal of what may be 0": (lambda s, v: 1 / (v - 1), ALL, "Reciprocal .* divides by depends on the input"),
    "buffer over": (lambda s, v: s.two / v, ALL, "Div .* divides by depends on the input"),
    "negative over": (lambda s, v: (v - 3) / (v * v + 1), ALL, "Div .* divides by depends on the input"),
    "negative power": (lambda s, v: v**-1, ("ibp",), "Pow .* exponent may be negative"),
    "power": (lambda s, v: v**2, LINEAR, "Pow at"),
    "square root": (lambda s, v: v + v.sqrt(), LINEAR, "Sqrt at"),
    "twice": (lambda s, v: torch.cat([v, v - 1], 1)[:, [0, 0, 1]].sum(1, True), LINEAR, "Gather .* more than once"),
}
SOUND = {
    "slope 0": lambda s, v: F.leaky_relu(v - 1, 0.0),
    "slope 1": lambda s, v: F.leaky_relu(v - 1, 1.0),
    "number under": lambda s, v: (v - 1) / 7,
    "buffer under": lambda s, v: (v - 1) / (s.two * s.two),
    "parameter under": lambda s, v: (v - 1) / s.three,
    "size under": lambda s, v: (v - 1) / v.shape[1],
    "once": lambda s, v: torch.cat([v, v - 1, -2 * v], 1)[:, [2, 0]].sum(1, True),
}


def excess(function, method: str) -> float:
    """How far the worst bound lies above a margin that a point of the box has."""
    excesses = []
    for sign in (1.0, -1.0):
        model = Narrow(function, sign)
        for middle, eps in ((0.5, 0.3), (0.2, 0.1)):
            points = torch.linspace(middle - eps, middle + eps, 1001, dtype=DOUBLE).unsqueeze(1)
            x = torch.tensor([[middle]], dtype=DOUBLE)
            bound = margin_lower_bounds_lirpa(model, x, torch.tensor([0]), LinfBall(eps), method, iterations=2)
            excesses.append((bound[0, 1] - (model(points) @ torch.tensor([1.0, -1.0], dtype=DOUBLE)).min()).item())
    return max(excesses)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in UNSOUND for method in UNSOUND[name][1]])
def test_operations_of_wrong_bounds_are_refused(name, method):
    function, _, says = UNSOUND[name]
    with pytest.raises(UnsupportedLayer, match=f"gives wrong bounds for {says}.*use another method"):
        excess(function, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOUND)
def test_their_like_of_right_bounds_are_not(name, method):
    assert -0.5 < excess(SOUND[name], method) < 1e-6


def test_no_certificate_rests_on_them():
    """Without an attack nothing else would tell: the margin is 0.55 + 1.5 (x - 0.5), which is below 0 at 0.1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.LeakyReLU(1.5), nn.Linear(1, 2)).to(DOUBLE).eval()
    for layer, weight, bias in ((1, [[1.0]], [-0.5]), (3, [[1.0], [0.0]], [0.55, 0.0])):
        model[layer].weight.data, model[layer].bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
    x = torch.tensor([[0.5]], dtype=DOUBLE)
    with pytest.raises(UnsupportedLayer, match="slope 1.5"):
        certify(model, x, torch.tensor([0]), LinfBall(0.4), "lirpa-crown", attack_steps=0)
