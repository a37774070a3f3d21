"""The networks of the certified-training literature, as plain `nn.Sequential`s with readable layer names.

`cnn_small` and `cnn_large` are the ones of CROWN-IBP (Zhang et al., ICLR 2020, after Wong et al. 2018) and
of HYDRA (Sehwag et al., NeurIPS 2020), `cnn7` is today's standard (Gowal et al. 2018; Shi et al., NeurIPS 2021).
With `batch_norm` a BatchNorm stands between each hidden layer and its ReLU, as in Shi et al. `width` scales the
channels and the hidden units.

Inputs are (batch, channels, height, width) with pixels in [0, 1]; outputs are logits (batch, classes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from certifiers.errors import InputError
from certprune.models.sizes import checked_width, scaled

# (channels, kernel, stride), padding 1 throughout.
SMALL = ((16, 4, 2), (32, 4, 2))
LARGE = ((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2))
SEVEN = ((64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1))


def mlp(
    input_shape: tuple[int, int, int],
    classes: int,
    hidden: Sequence[int] = (256, 256),
    width: float = 1.0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Fully connected, one ReLU after each hidden layer."""
    if isinstance(hidden, int):
        hidden = (hidden,)
    return _network("mlp", input_shape, classes, (), tuple(hidden), width, batch_norm)


def cnn_small(
    input_shape: tuple[int, int, int], classes: int, width: float = 1.0, batch_norm: bool = False
) -> nn.Sequential:
    """Two convolutions (16 and 32 channels, 4x4, stride 2) and 100 hidden units: 166,248 weights on MNIST."""
    return _network("cnn_small", input_shape, classes, SMALL, (100,), width, batch_norm)


def cnn_large(
    input_shape: tuple[int, int, int], classes: int, width: float = 1.0, batch_norm: bool = False
) -> nn.Sequential:
    """Four convolutions (32, 32, 64, 64 channels), two layers of 512 units: 1,973,536 weights on MNIST."""
    return _network("cnn_large", input_shape, classes, LARGE, (512, 512), width, batch_norm)


def cnn7(input_shape: tuple[int, int, int], classes: int, width: float = 1.0, batch_norm: bool = True) -> nn.Sequential:
    """Shi et al.'s CNN7: five convolutions (64, 64, 128, 128, 128 channels), 512 units: 17,189,568 weights on CIFAR."""
    return _network("cnn7", input_shape, classes, SEVEN, (512,), width, batch_norm)


def _network(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int,
    convolutions: Sequence[tuple[int, int, int]],
    hidden: Sequence[int],
    width: float,
    batch_norm: bool,
) -> nn.Sequential:
    _check(name, hidden, width, batch_norm)
    channels, height, breadth = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    position = 0
    for number, (base, kernel, stride) in enumerate(convolutions, start=1):
        position += 1
        out = scaled(base, width)
        layers[f"conv{number}"] = nn.Conv2d(channels, out, kernel, stride, padding=1)
        if batch_norm:
            layers[f"bn{position}"] = nn.BatchNorm2d(out)
        layers[f"relu{position}"] = nn.ReLU()
        channels = out
        height, breadth = ((size + 2 - kernel) // stride + 1 for size in (height, breadth))
        if min(height, breadth) < 1:
            raise InputError(
                f"{name} cannot take images of shape {tuple(input_shape)} (channels, height, width): nothing "
                f"is left of them at conv{number}. Use larger images, or the model 'mlp'."
            )
    layers["flatten"] = nn.Flatten()
    features = channels * height * breadth
    for number, base in enumerate(hidden, start=1):
        position += 1
        out = scaled(base, width)
        layers[f"fc{number}"] = nn.Linear(features, out)
        if batch_norm:
            layers[f"bn{position}"] = nn.BatchNorm1d(out)
        layers[f"relu{position}"] = nn.ReLU()
        features = out
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _check(name: str, hidden: Sequence[int], width: float, batch_norm: bool) -> None:
    if not all(isinstance(units, int) and not isinstance(units, bool) and units > 0 for units in hidden):
        raise InputError(f"{name}: hidden must list numbers of units, say [64], but {list(hidden)} came.")
    checked_width(name, width)
    if not isinstance(batch_norm, bool):
        raise InputError(f"{name}: batch_norm must be true or false, but {batch_norm!r} came.")
