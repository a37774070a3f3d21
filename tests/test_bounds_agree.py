"""The engine against auto_LiRPA, an independent implementation of the same bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certifiers.bounds import margin_lower_bounds
from certifiers.lirpa import margin_lower_bounds_lirpa
from certifiers.threat import L2Ball, LinfBall

from .nets import NETS, images

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
