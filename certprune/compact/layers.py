"""A compacted network as a plain ``nn.Module``, and the description by which it is built again without pickle.

A description is a list of ``{"kind": ..., "inputs": [...], ...}``, one for each layer; ``inputs`` are places in that
list, from 1; 0 is the network's input. Where each layer reads the one before it, the module is an ``nn.Sequential``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError


class Select(nn.Module):
    """Some features of a flat input, ``x[:, index]``; reading each at most once keeps its bounds exact."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("index", torch.arange(size))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} features"


class Affine(nn.Module):
    """``scale * x + shift`` of one sample's shape, or shapes that broadcast against it."""

    def __init__(self, scale: Sequence[int], shift: Sequence[int]):
        super().__init__()
        self.register_buffer("scale", torch.ones(tuple(scale)))
        self.register_buffer("shift", torch.zeros(tuple(shift)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Shift(nn.Module):
    """``x + shift``, a constant for each unit."""

    def __init__(self, shift: Sequence[int]):
        super().__init__()
        self.register_buffer("shift", torch.zeros(tuple(shift)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Branched(nn.Module):
    """Layers that read the results of any before them; the last one's is the network's."""

    def __init__(self, layers: OrderedDict[str, nn.Module], inputs: Sequence[Sequence[int]]):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.inputs = tuple(tuple(places) for places in inputs)

    def extra_repr(self) -> str:
        return f"inputs={self.inputs}"

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, places in zip(self.layers.values(), self.inputs, strict=True):
            values.append(layer(*(values[place] for place in places)))
        return values[-1]


KINDS: dict[str, Callable[..., nn.Module]] = {
    "conv": nn.Conv2d,
    "linear": nn.Linear,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "max_pool": nn.MaxPool2d,
    "avg_pool": nn.AvgPool2d,
    "mean": nn.AdaptiveAvgPool2d,
    "flatten": nn.Flatten,
    "unflatten": nn.Unflatten,
    "select": Select,
    "affine": Affine,
    "shift": Shift,
    "sum": Sum,
    "difference": Difference,
}


def build(description: Sequence[dict[str, Any]], tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The module of a description, with these weights, in eval mode.

    Raises InputError for a description that makes no network, and for tensors of another one.
    """
    try:
        layers, inputs = _layers(description)
        chain = all(places == [place] for place, places in enumerate(inputs))
        model = (nn.Sequential(layers) if chain else Branched(layers, inputs)).to(dtype).eval()
        model.load_state_dict(tensors)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"This is not a network that certprune compact wrote: {str(error).splitlines()[0]}. Make it anew."
        ) from error
    _check_indices(model)
    return model


def _layers(description: Sequence[dict[str, Any]]) -> tuple[OrderedDict[str, nn.Module], list[list[int]]]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = []
    counts: dict[str, int] = {}
    for place, row in enumerate(description):
        options = dict(row)
        kind, sources = options.pop("kind"), [int(i) for i in options.pop("inputs")]
        if kind not in KINDS or not sources or not all(0 <= i <= place for i in sources):
            raise InputError(
                f"Layer {place + 1} of this compacted network cannot be built: its kind is {kind!r} and it reads the "
                f"layers {sources}. It was written by another version of certprune, or is damaged; make it anew."
            )
        counts[kind] = counts.get(kind, 0) + 1
        layers[f"{kind}{counts[kind]}"] = KINDS[kind](**options)
        inputs.append(sources)
    if not layers:
        raise InputError("This compacted network has no layers. Make it anew with certprune compact.")
    return layers, inputs


def _check_indices(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Select) and (len(module.index.unique()) < len(module.index) or (module.index < 0).any()):
            raise InputError(
                f"{name} of this compacted network reads a feature twice or before the first, which none that "
                "certprune compact wrote does. Make it anew."
            )
