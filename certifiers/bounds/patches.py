"""Backward rows of a convolution's units, kept as small as what each unit sees.

A unit of a convolutional layer depends on a patch of every layer below it. Instead of a row as large as the layer,
each position of the layer gets a patch: its coefficients are ``(samples or 1, positions or 1, channels, entries)``,
entries being the channels, height and width of the patch, and its place follows from stride and padding alone. So
the first maps are shared by all samples and positions, and an image's border costs nothing extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Network
from .nonlinear import ReLU
from .operations import Conv2d, Scale
from .parallel import Slopes
from .region import Region

#: A matrix product takes this many multiply-adds in the time of one in a convolution of small patches (measured).
_MATRIX_ADVANTAGE = 16


@dataclass(frozen=True)
class Window:
    """Which part of a plane the patch of each output position covers."""

    out: tuple[int, int]  # positions
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def through(self, layer: Conv2d) -> Window:
        """The window on the layer's input that this window on its output depends on."""
        return Window(
            self.out,
            tuple((k - 1) * s + f for k, s, f in zip(self.kernel, layer.stride, layer.weight.shape[-2:], strict=True)),
            tuple(a * b for a, b in zip(self.stride, layer.stride, strict=True)),
            tuple(p * s + q for p, s, q in zip(self.padding, layer.stride, layer.padding, strict=True)),
        )

    def entries(self, plane: Tensor) -> Tensor:
        """What each patch covers of ``plane`` (batch, channels, height, width): ``(batch, positions, entries)``.

        Outside the plane there are zeros.
        """
        spare = [
            (o - 1) * s + k - p - size
            for o, s, k, p, size in zip(self.out, self.stride, self.kernel, self.padding, plane.shape[-2:], strict=True)
        ]
        pad = (self.padding[1], spare[1], self.padding[0], spare[0])
        return F.unfold(F.pad(plane, pad), self.kernel, stride=self.stride).transpose(1, 2)


def chain(network: Network, place: int) -> list[int] | None:
    """The places from ``place`` down to the first layer if patches can be carried through all of them, else None."""
    found = []
    while place != 0:
        operation = network.operations[place]
        plain = isinstance(operation, ReLU) or (isinstance(operation, Scale) and _by_channel(operation.scale))
        square = isinstance(operation, Conv2d) and operation.groups == 1 and operation.dilation == (1, 1)
        if not (plain or square) or len(network.nodes[place].shape) != 3:
            return None
        found.append(place)
        (place,) = network.nodes[place].inputs
    return found if len(network.nodes[0].shape) == 3 else None


def work(network: Network, places: list[int], samples: int) -> float:
    """About how many multiply-adds :func:`deviations` takes, counted as those of a large matrix product."""
    channels, *out = network.nodes[places[0]].shape
    window, shared, total = Window(tuple(out)), True, 0.0
    for place in places:
        operation = network.operations[place]
        if isinstance(operation, ReLU):
            shared = False
        if isinstance(operation, Conv2d):
            each = min(_costs(window, operation)) * channels
            total += each if shared else each * samples * prod(out)
            window = window.through(operation)
        elif not shared:
            total += samples * prod(out) * channels * _entries(window, network.nodes[place].shape[0])
    return total


def _entries(window: Window, channels: int) -> int:
    return channels * prod(window.kernel)


def deviations(
    network: Network,
    places: list[int],
    relaxations: dict[int, Slopes],
    region: Region,
    memory_mb: float,
) -> tuple[Tensor, Tensor]:
    """How far every unit of node ``places[0]`` can be from its centre: least and most, ``(batch, *shape)``.

    ``places`` is the node's :func:`chain`; ``relaxations`` has those of the ReLUs on it. Works through the channels
    in groups of about ``memory_mb`` megabytes.
    """
    channels, *out = network.nodes[places[0]].shape
    like = region.box.centre
    rows = torch.eye(channels, dtype=like.dtype, device=like.device).reshape(1, 1, channels, channels)
    size = max(_entries(w, c) for w, c in _windows(network, places))
    group = int(memory_mb * 2**20 / (4 * like.shape[0] * prod(out) * size * like.element_size()))
    parts = [_group(network, places, rows[:, :, i : i + max(group, 1)], relaxations, region)
             for i in range(0, channels, max(group, 1))]  # fmt: skip
    return tuple(torch.cat([part[end] for part in parts], 1).unflatten(2, out) for end in (0, 1))


def _windows(network: Network, places: list[int]):
    window = Window(tuple(network.nodes[places[0]].shape[1:]))
    for place in places:
        operation = network.operations[place]
        if isinstance(operation, Conv2d):
            window = window.through(operation)
        yield window, network.nodes[network.nodes[place].inputs[0]].shape[0]


def _group(network, places, rows, relaxations, region) -> tuple[Tensor, Tensor]:
    """Least and most deviations of some channels' units, ``(batch, channels, positions)``."""
    window = Window(tuple(network.nodes[places[0]].shape[1:]))
    error: Tensor | float = 0.0
    inside = True  # no coefficient lies outside the plane
    for place in places:
        operation, before = network.operations[place], network.nodes[network.nodes[place].inputs[0]].shape
        if isinstance(operation, ReLU):
            relaxed = relaxations[place]
            error = error + _meet(rows.abs(), window.entries(relaxed.radius))
            rows, inside = rows * window.entries(relaxed.slope).unsqueeze(2), True
        elif isinstance(operation, Scale):
            rows = _scaled(rows, operation.scale, before[0])
        else:
            if not inside:
                rows = rows * _plane(window, network.nodes[place].shape, rows)
            rows = _transpose(rows, window, operation)
            window, inside = window.through(operation), not any(operation.padding)
    if region.x is None:
        reach = error + _meet(rows.abs(), window.entries(region.box.radius))
        return -reach, reach
    rows = rows * _plane(window, network.nodes[0].shape, rows)
    reach = _meet(rows.abs(), window.entries(region.box.radius))
    shift = _meet(rows, window.entries(region.x - region.box.centre))
    length = region.eps * (rows.square().sum(3) + torch.finfo(rows.dtype).tiny).sqrt().transpose(1, 2)
    least = torch.maximum(-reach, shift - length)
    return least - error, torch.minimum(reach, shift + length).maximum(least) + error


def _meet(rows: Tensor, entries: Tensor) -> Tensor:
    """Products of patches with what they cover, ``(batch, channels, positions)``."""
    if rows.shape[:2] == (1, 1):
        return rows[0, 0] @ entries.transpose(1, 2)
    return (rows @ entries.unsqueeze(3)).squeeze(3).transpose(1, 2)


def _plane(window: Window, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """1 where a patch lies inside the plane, 0 outside, ``(1, positions, 1, entries)``."""
    return window.entries(torch.ones((1, *shape), dtype=like.dtype, device=like.device)).unsqueeze(2)


def _transpose(rows: Tensor, window: Window, layer: Conv2d) -> Tensor:
    """Patches of the layer's output carried to its input, by whichever of two ways is cheaper."""
    by_matrix, by_convolution = _costs(window, layer)
    channels = layer.weight.shape[0]
    if by_matrix <= by_convolution:
        entries = _entries(window, channels)
        eye = torch.eye(entries, dtype=rows.dtype, device=rows.device).reshape(entries, channels, *window.kernel)
        return rows @ F.conv_transpose2d(eye, layer.weight, None, layer.stride).flatten(1)
    patches = rows.reshape(-1, channels, *window.kernel)
    return F.conv_transpose2d(patches, layer.weight, None, layer.stride).reshape(*rows.shape[:3], -1)


def _costs(window: Window, layer: Conv2d) -> tuple[float, float]:
    """Multiply-adds for one patch: by a matrix product, and by a convolution in the same unit."""
    entries = _entries(window, layer.weight.shape[0])
    dense = entries * _entries(window.through(layer), layer.weight.shape[1])
    return dense, prod(window.kernel) * layer.weight.numel() * _MATRIX_ADVANTAGE


def _by_channel(scale: Tensor | float) -> bool:
    return not isinstance(scale, Tensor) or scale.dim() == 0 or (scale.dim() == 3 and scale.shape[-2:] == (1, 1))


def _scaled(rows: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return rows * scale
    return (rows.unflatten(3, (channels, -1)) * scale.reshape(-1, 1)).flatten(3)
