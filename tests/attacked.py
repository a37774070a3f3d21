"""Networks behind any first layer, and the least margins that sampling and gradients find in a threat set."""

import torch
from torch import Tensor, nn

DOUBLE = torch.float64


class Calls(nn.Module):
    """An `nn.Module` from a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def behind(first: nn.Module, middle: nn.Module | None = None) -> nn.Module:
    """`first`, then a small convolutional network, `middle` inside it, in float64."""
    torch.manual_seed(0)
    layers = [first, nn.Conv2d(1, 3, 3), nn.ReLU(), middle or nn.Identity(), nn.ReLU(), nn.Flatten()]
    features = nn.Sequential(*layers)
    width = features(torch.rand(1, 1, 8, 8)).shape[1]
    return nn.Sequential(*layers, nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4)).to(DOUBLE).eval()


def least_margins(model: nn.Module, x: Tensor, y: Tensor, threat) -> Tensor:
    """(batch, classes): the least margins found by random points, corners and a few gradient steps per class."""
    lower, upper = threat.box(x)
    with torch.no_grad():
        classes = model(x).shape[1]
    least = torch.full((len(x), classes), torch.inf, dtype=x.dtype)

    def see(points: Tensor) -> None:
        with torch.no_grad():
            logits = model(points)
        torch.minimum(least, logits.gather(1, y[:, None]) - logits, out=least)

    for place in range(60):
        share = torch.rand_like(x)
        see(threat.project(x, lower + (upper - lower) * (share.round() if place % 2 else share)))
    for j in range(classes):
        point = x.clone()
        for _ in range(12):
            point.requires_grad_(True)
            logits = model(point)
            margins = logits.gather(1, y[:, None])[:, 0] - logits[:, j]
            (slope,) = torch.autograd.grad(margins.sum(), point)
            if threat.norm == "linf":
                step = slope.sign()
            else:
                step = slope / slope.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            point = threat.project(x, point.detach() - threat.eps / 3 * step)
            see(point)
    return least
