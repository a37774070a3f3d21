"""auto_LiRPA's bounds are never above a margin that some point has, whatever the layers, or they are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
