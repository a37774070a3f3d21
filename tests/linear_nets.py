"""Two-class linear networks, whose worst perturbation is known by hand, and the mode of the prune stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .nets import images


def linear(seed=0):
    """Two classes; the worst perturbation follows the difference of the rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()


def inner_images(n=6, seed=0):
    """Images away from 0 and 1, so that only the ball binds."""
    x, y = images(n, seed)
    return 0.4 + 0.2 * x, y % 2


def margins(model, x, y):
    logits = model(x)
    return logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]


def dual_norm(model, norm):
    row = model[1].weight[1] - model[1].weight[0]
    return row.abs().sum() if norm == "linf" else row.norm()


def worst_loss(model, x, y, norm, eps):
    """The exact worst cross-entropy of a linear two-class model: the margin drops by eps times its dual norm."""
    return F.softplus(-(margins(model, x, y) - eps * dual_norm(model, norm))).mean()


def mixed(model):
    """Train mode but for batch normalisation, as in the prune stage."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model
