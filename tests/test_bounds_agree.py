"""The engine against auto_LiRPA, an independent implementation of the same bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certifiers.bounds import margin_lower_bounds
from certifiers.lirpa import margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall

from .nets import NETS, images
from .test_bounds_by_hand import Chosen

METHODS = ("ibp", "crown-ibp", "crown")  # those that auto_LiRPA has by these names; test_symbolic.py for the other
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}


@pytest.mark.parametrize("dtype", RELATIVE, ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_linf_bounds_equal_auto_lirpa(name, method, dtype):
    for seed in (1, 5):
        model = NETS[name](seed=seed, dtype=dtype)
        x, y = images(4, seed=1, dtype=dtype)
        for eps in (0.02, 0.1):
            ours = margin_lower_bounds(model, x, y, LinfBall(eps), method)
            reference = margin_lower_bounds_lirpa(model, x, y, LinfBall(eps), method)
            assert (ours - reference).abs().max() <= RELATIVE[dtype] * reference.abs().max()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NETS)
def test_crown_is_no_looser_than_auto_lirpa(name, seed):
    """auto_LiRPA bounds stable units backward too, which can unsettle them again; ours stay stable, hence tighter."""
    model = NETS[name](seed=seed, dtype=torch.float64)
    x, y = images(4, seed=seed, dtype=torch.float64)
    ours = margin_lower_bounds(model, x, y, LinfBall(0.1), "crown")
    reference = margin_lower_bounds_lirpa(model, x, y, LinfBall(0.1), "crown")
    assert ours.mean() >= reference.mean() - 1e-12
    assert (ours - reference).abs().max() <= 0.05 * reference.abs().max()


class Unpadded(nn.Sequential):
    """auto_LiRPA takes a convolution's whole kernel for its l2 norm at the borders too, where ours is smaller."""

    def __init__(self, dtype: torch.dtype):
        convolutions = nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU()
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(24, 10))
        self.to(dtype).eval()


@pytest.mark.parametrize("dtype", RELATIVE, ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "unpadded"])
def test_l2_bounds_equal_auto_lirpa(name, method, dtype):
    """Inputs in the middle of the pixel range, where the cut to [0, 1] takes nothing off the ball."""
    torch.manual_seed(1)
    model = Unpadded(dtype) if name == "unpadded" else NETS[name](seed=1, dtype=dtype)
    x, y = images(4, seed=1, dtype=dtype)
    x = 0.4 + 0.2 * x
    ours = margin_lower_bounds(model, x, y, L2Ball(0.3), method)
    reference = margin_lower_bounds_lirpa(model, x, y, L2Ball(0.3), method)
    assert (ours - reference).abs().max() <= RELATIVE[dtype] * reference.abs().max()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("name", NETS)
def test_l2_bounds_are_no_looser_than_auto_lirpa(name, method):
    model = NETS[name](seed=3, dtype=torch.float64)
    x, y = images(4, seed=1, dtype=torch.float64)
    ours = margin_lower_bounds(model, x, y, L2Ball(0.3), method)
    reference = margin_lower_bounds_lirpa(model, x, y, L2Ball(0.3), method)
    assert ours.mean() >= reference.mean() - 1e-12
    if method == "ibp":  # smaller boxes give smaller boxes: a theorem, so for each margin
        assert (ours >= reference - 1e-12).all()


class Selecting(nn.Sequential):
    """Pixels are selected, and hidden units, both out of their order."""

    def __init__(self, dtype: torch.dtype):
        pixels, units = Chosen([40, 3, 63, 7, 12, 0, 25]), Chosen([5, 0, 11, 3])
        super().__init__(nn.Flatten(), pixels, nn.Linear(7, 12), nn.ReLU(), units, nn.Linear(4, 10))
        self.to(dtype).eval()

    def without(self) -> nn.Module:
        """The same function with wider layers instead of selections."""
        layers = list(self)
        for place in (4, 1):
            after, index = layers[place + 1], layers.pop(place).places
            wide = nn.Linear(64 if place == 1 else 12, after.out_features, dtype=after.weight.dtype)
            wide.weight.data.zero_()[:, index] = after.weight.data
            wide.bias.data = after.bias.data
            layers[place] = wide
        return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threat", [LinfBall(0.1), L2Ball(0.3)], ids=["linf", "l2"])
def test_bounds_of_selected_features_equal_auto_lirpa(threat, method):
    torch.manual_seed(1)
    model = Selecting(torch.float64)
    x, y = images(4, seed=1, dtype=torch.float64)
    x = 0.4 + 0.2 * x
    ours = margin_lower_bounds(model, x, y, threat, method)
    # Behind a selection auto_LiRPA takes an l2 ball for its box; without one it does not.
    reference = margin_lower_bounds_lirpa(model if threat.norm == "linf" else model.without(), x, y, threat, method)
    assert (ours - reference).abs().max() <= 1e-8 * reference.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_auto_lirpa(name):
    """Training by the bound is training by the same bound: the gradients of all weights agree too."""
    x, y = images(4, seed=2, dtype=torch.float64)
    gradients = []
    for bound in (margin_lower_bounds, margin_lower_bounds_lirpa):
        model = NETS[name](seed=4, dtype=torch.float64)
        bound(model, x, y, LinfBall(0.05), "crown-ibp").square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, reference in gradients[1].items():
        assert (gradients[0][key] - reference).abs().max() <= 1e-8 * max(reference.abs().max(), 1.0), key
