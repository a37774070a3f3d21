"""Random networks for soundness tests: depth, widths, strides, residuals, BatchNorm, pooling and sparsity by seed."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

CLASSES = 5
SHAPE = (2, 8, 8)


class Residual(nn.Module):
    """``relu(body(x) ± skip(x))``, the skip a strided 1x1 convolution where the shapes ask for one."""

    def __init__(self, channels: int, out: int, stride: int, sign: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.norm = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        body = self.conv2(torch.relu(self.norm(self.conv1(x))))
        skip = self.skip(x)
        return torch.relu(body + skip if self.sign > 0 else body - skip)


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.6]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.3, 0.5]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def random_net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network of this seed for (batch, 2, 8, 8) inputs and 5 logits, in eval mode, some weights zeroed."""
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(*_layers(draw))
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight)  # negative scales too
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
        sparsity = draw.choice([0.0, 0.5, 0.9])
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data *= (torch.rand_like(module.weight) >= sparsity) * draw.uniform(0.7, 2.0)
    return net.to(dtype).eval()


def _activation(draw: random.Random) -> nn.Module:
    return draw.choice([nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1)])


def _layers(draw: random.Random) -> list[nn.Module]:
    layers: list[nn.Module] = [Normalise()] if draw.random() < 0.5 else []
    channels, size = 2, 8
    for _ in range(draw.randint(0, 3)):
        out, stride = draw.choice([4, 6]), draw.choice([1, 2]) if size > 2 else 1
        if draw.random() < 0.35:
            layers.append(Residual(channels, out, stride, draw.choice([1.0, -1.0])))
            size = (size - 1) // stride + 1
        else:
            kernel, padding, dilation = draw.choice([(3, 1, 1), (2, 1, 1), (3, 2, 2)])
            groups = 2 if draw.random() < 0.3 else 1
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw.random() < 0.7))
            size = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            if draw.random() < 0.4:
                layers.append(nn.BatchNorm2d(out))
            layers.append(_activation(draw))
        channels = out
        if size >= 4 and draw.random() < 0.4:
            layers.append(draw.choice([nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1)]))
            size = (size + 2 * 0 - 2) // 2 + 1 if layers[-1].kernel_size == 2 else (size + 2 - 3) // 2 + 1
    if draw.random() < 0.3:
        layers.append(nn.AdaptiveAvgPool2d(draw.choice([1, 2, 3])))
        size = layers[-1].output_size
    layers.append(nn.Flatten())
    width = channels * size * size
    for _ in range(draw.randint(0, 2)):
        hidden = draw.choice([8, 20])
        layers.append(nn.Linear(width, hidden))
        if draw.random() < 0.3:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(_activation(draw))
        width = hidden
    return [*layers, nn.Linear(width, CLASSES)]
