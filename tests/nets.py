"""Small seeded networks for the tests: plain functions, 1x8x8 images in, ten logits out, in eval mode.

They are untrained, so their bounds are loose; weights are drawn from the seed alone and leave torch's global
generator as it was. Pass ``dtype=torch.float64`` for comparisons to many digits.
"""

import torch
from torch import Tensor, nn

SHAPE = (1, 8, 8)
CLASSES = 10


def tiny_mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Flatten and three linear layers."""
    with _seeded(seed):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
        )
    return net.to(dtype).eval()


def tiny_conv(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two convolutions, one with a stride, and two linear layers."""
    with _seeded(seed):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 20),
            nn.ReLU(),
            nn.Linear(20, CLASSES),
        )
    return net.to(dtype).eval()


def tiny_bn(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """BatchNorm2d and BatchNorm1d whose running statistics and affine parameters are not the defaults."""
    with _seeded(seed):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, CLASSES),
        )
        _shake_batchnorms(net)
    return net.to(dtype).eval()


class Residual(nn.Module):
    """One residual block whose skip goes through a 1x1 convolution, with a BatchNorm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.skip = nn.Conv2d(4, 6, 1, stride=2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv2(self.relu(self.bn(self.conv1(x))))
        return self.head(self.flatten(self.relu(y + self.skip(x))))


def tiny_residual(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A :class:`Residual` network."""
    with _seeded(seed):
        net = Residual()
        _shake_batchnorms(net)
    return net.to(dtype).eval()


class HalfSpace(nn.Module):
    """Class 1 where w.x + b > 0; smoothing it has closed forms: the distance to the plane, in x and in probability."""

    def __init__(self, size: int = 6, seed: int = 3) -> None:
        super().__init__()
        weights = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.w = nn.Parameter(weights, requires_grad=False)
        self.b = nn.Parameter(-0.5 * weights.sum(), requires_grad=False)  # through the middle of [0, 1]^size
        self.eval()

    def forward(self, x):
        score = x @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], 1)

    def distance(self, x):
        """Signed, (batch,), in double precision."""
        return (x.double() @ self.w.double() + self.b.double()) / self.w.double().norm()

    def at(self, distances):
        """Points with these signed distances to the plane."""
        distances = torch.as_tensor(distances, dtype=torch.float64)
        return (0.5 + distances[:, None] * self.w.double() / self.w.double().norm()).float()


NETS = {"mlp": tiny_mlp, "conv": tiny_conv, "bn": tiny_bn, "residual": tiny_residual}


def images(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images (n, 1, 8, 8) in [0, 1] and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (n,), generator=generator)


class _seeded:
    """A with-block whose random numbers come from the seed and that restores the global generator."""

    def __init__(self, seed: int) -> None:
        self.fork = torch.random.fork_rng(devices=[])
        self.seed = seed

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(*error)


def _shake_batchnorms(net: nn.Module) -> None:
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
