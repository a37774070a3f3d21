"""Residual networks for small images: wide ones (Zagoruyko & Komodakis 2016), ResNet-18, and Wong et al.'s.

Layers stand in the order in which data passes them, a shortcut's last; `certprune.exchange.hydra` relies on it.
Convolutions followed by BatchNorm have no bias. The last average pool is adaptive, so that images may be of any size.
"""

from __future__ import annotations

from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.models.sizes import checked_width, scaled, shape_left


def wrn_28_4(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """WideResNet-28-4: 28 layers, 4 times as wide: 5,841,840 weights on CIFAR-10."""
    return WideResNet("wrn_28_4", input_shape, classes, blocks=4, widen=4, width=width)


def wrn_28_10(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """WideResNet-28-10: 28 layers, 10 times as wide: 36,461,232 weights on CIFAR-10."""
    return WideResNet("wrn_28_10", input_shape, classes, blocks=4, widen=10, width=width)


def resnet18(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 for small images: a 3x3 convolution first and no max-pool: 11,164,352 weights on CIFAR-10."""
    return ResNet18(input_shape, classes, width)


def cnn_resnet(input_shape: tuple[int, int, int], classes: int, blocks: int = 5, width: float = 1.0) -> nn.Sequential:
    """Wong et al.'s residual network without BatchNorm, also CROWN-IBP's and HYDRA's; blocks: in each of 3 groups.

    Wong et al. 2018 (arXiv 1805.12514). The first group has one block more; the second and third begin with a 4x4
    convolution of stride 2.
    """
    name = "cnn_resnet"
    checked_width(name, width)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise InputError(f"{name}: blocks must be a whole number, at least 1, but {blocks!r} came.")
    height, breadth = shape_left(name, input_shape, halvings=2)
    layers = nn.Sequential()
    channels = scaled(16, width)
    layers.add_module("conv", nn.Conv2d(input_shape[0], channels, 3, padding=1))
    layers.add_module("relu", nn.ReLU())
    for group, (base, count) in enumerate(((16, blocks + 1), (32, blocks), (64, blocks)), start=1):
        for number in range(1, count + 1):
            out = scaled(base, width)
            layers.add_module(f"block{group}_{number}", _PlainBlock(channels, out, halve=group > 1 and number == 1))
            channels = out
    units = scaled(1000, width)
    layers.add_module("flatten", nn.Flatten())
    layers.add_module("fc1", nn.Linear(channels * height * breadth, units))
    layers.add_module("relu_fc1", nn.ReLU())
    layers.add_module("fc2", nn.Linear(units, classes))
    return layers


class _PlainBlock(nn.Module):
    """relu(conv2(relu(conv1(x))) + shortcut(x)), the shortcut a convolution of its own; no BatchNorm."""

    def __init__(self, channels: int, out: int, halve: bool):
        super().__init__()
        stride = 2 if halve else 1
        self.conv1 = nn.Conv2d(channels, out, 4 if halve else 3, stride, padding=1)
        self.relu1 = nn.ReLU()
        self.shortcut = nn.Conv2d(channels, out, stride, stride)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.shortcut(x) + self.conv2(self.relu1(self.conv1(x))))


class WideResNet(nn.Module):
    """Pre-activation blocks in three groups of 16, 32 and 64 * widen channels; `blocks` in each (depth 6 n + 4)."""

    def __init__(
        self, name: str, input_shape: tuple[int, int, int], classes: int, blocks: int, widen: int, width: float
    ):
        super().__init__()
        checked_width(name, width)
        shape_left(name, input_shape, halvings=2)
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        for group, base in enumerate((16, 32, 64), start=1):
            out = scaled(base * widen, width)
            first = _WideBlock(channels, out, stride=1 if group == 1 else 2)
            rest = [_WideBlock(out, out, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"block{group}", nn.Sequential(first, *rest))
            channels = out
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn(x)))))


class _WideBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; where the width changes, the shortcut starts after the first ReLU."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        same = channels == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        through = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return through + (x if self.shortcut is None else self.shortcut(active))


class ResNet18(nn.Module):
    """He et al. 2016, two blocks in each of four groups of 64 to 512 channels."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: float = 1.0):
        super().__init__()
        checked_width("resnet18", width)
        shape_left("resnet18", input_shape, halvings=3)
        channels = scaled(64, width)
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        for group, base in enumerate((64, 128, 256, 512), start=1):
            out = scaled(base, width)
            first = _BasicBlock(channels, out, stride=1 if group == 1 else 2)
            self.add_module(f"layer{group}", nn.Sequential(first, _BasicBlock(out, out, stride=1)))
            channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.pool(x)))


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = channels == out and stride == 1
        convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(convolution, nn.BatchNorm2d(out))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        through = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(through + self.shortcut(x))
