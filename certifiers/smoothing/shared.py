"""Counting with noise that all inputs share: drawn once, and put through the first linear layers once.

Up to the first nonlinearity a network is affine, W (x + noise) + b = (W x + b) + W noise. With one stream of noise
for all inputs, W noise is computed once for each block of it, and what is left for each input is an addition and the
rest of the network. In the floating point numbers of a computer the sum is rounded otherwise than in the network as
it stands: a sample whose two largest logits are equal up to rounding may be counted otherwise. Input and noise lie on
the grid here too, but the sum behind the first layer is rounded as it falls: of a network that is made to look at the
low bits of that sum, only noise of each input's own certifies what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.bounds import check_against_model, trace
from certifiers.bounds.graph import Network
from certifiers.bounds.nonlinear import ReLU
from certifiers.bounds.operations import AveragePool2d, Conv2d, Linear, Reshape, Scale, Select
from certifiers.errors import UnsupportedLayer
from certifiers.smoothing.noise import BLOCK
from certifiers.smoothing.sampling import Fill, check_finite, sole_winners

AFFINE = (Scale, Reshape, Select, AveragePool2d, Conv2d, Linear)

_TRIED = 8  # inputs on which the cut network is held against the model

Stop = Callable[[Tensor, int, Tensor], Sequence[bool]]  # (counts, samples so far, rows of x) -> which need no more


@dataclass(frozen=True)
class Split:
    """A network as ``tail(head(x) + linear(noise))``; `linear` is `head` without its constant part.

    `tail` may overwrite what it is given.
    """

    head: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    tail: Callable[[Tensor], Tensor]


def split_first_layer(model: nn.Module, x: Tensor) -> Split:
    """The model cut behind its first linear or convolutional layer, or, where there is none to find, at its input.

    It is not cut either where its traced form computes something else on some of ``x`` (batch, *shape) under noise.
    """
    try:
        graph = trace(model, tuple(x.shape[1:]))
        some = x[:_TRIED]
        noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0), dtype=some.dtype)
        check_against_model(graph, model, some + noise.to(some.device))
        network = graph.bind()
    except UnsupportedLayer:
        network = None
    cut = 0 if network is None else _affine_prefix(network)
    if cut == 0:
        return Split(lambda x: x, lambda noise: noise, model)
    first = network.operations[1 : cut + 1]
    behind = [_channels_last(operation) for operation in network.operations[cut + 1 :]]
    consumers = sum(cut in node.inputs for node in network.nodes[cut + 1 :])
    in_place = consumers == 1 and isinstance(behind[0], ReLU) and behind[0].slope == 0.0

    def head(x: Tensor) -> Tensor:
        for operation in first:
            x = operation.forward(x)
        return x

    def linear(noise: Tensor) -> Tensor:
        for operation in first:
            noise = operation.linear(noise)
        return noise

    def tail(features: Tensor) -> Tensor:
        values: dict[int, Tensor] = {cut: features}
        for place, operation in enumerate(behind, start=cut + 1):
            if place == cut + 1 and in_place:
                values[place] = features.relu_()
                continue
            values[place] = operation.forward(*(values[i] for i in network.nodes[place].inputs))
        return values[len(network.nodes) - 1]

    return Split(head, linear, tail)


def _affine_prefix(network: Network) -> int:
    """The place of the last node of the chain of affine operations from the input that holds one layer with weights.

    0 if there is none, or something behind it reaches back before it, as a skip connection does.
    """
    cut = 0
    for place in range(1, len(network.nodes)):
        operation = network.operations[place]
        if network.nodes[place].inputs != (place - 1,) or not isinstance(operation, AFFINE):
            return 0
        if isinstance(operation, Conv2d | Linear):
            cut = place
            break
    behind = range(cut + 1, len(network.nodes))
    return cut if all(i >= cut for place in behind for i in network.nodes[place].inputs) and behind else 0


def _channels_last(operation: Any) -> Any:
    """A convolution with its weights laid out channel by channel, as a CPU reads them best; others as they are."""
    if not isinstance(operation, Conv2d) or operation.weight.device.type != "cpu":
        return operation
    return replace(operation, weight=operation.weight.contiguous(memory_format=torch.channels_last))


def _laid_out(features: Tensor) -> Tensor:
    """The same for features (batch, channels, height, width)."""
    if features.dim() != 4 or features.device.type != "cpu":
        return features
    return features.contiguous(memory_format=torch.channels_last)


def shared_counts(
    split: Split,
    x: Tensor,
    fill: Fill,
    looks: Sequence[int],
    num_classes: int,
    batch_size: int,
    stop: Stop | None = None,
) -> tuple[Tensor, list[int]]:
    """(inputs, num_classes) int64 on the CPU: how many noisy copies of each input each class wins; and of how many.

    All inputs get the same noise; `stop` is asked at each of `looks` (rising numbers of samples, whole blocks but for
    the last) which inputs need no more. Ties are won by none. An input's numbers do not depend on the others.
    Raises InputError if a logit is not finite.
    """
    rows = max(batch_size // BLOCK, 1) * BLOCK
    samples = [0] * len(x)
    with torch.inference_mode():
        centres, hidden = _laid_out(split.head(x)), None
        buffer = x.new_empty((rows, *x.shape[1:]))
        counts = torch.zeros(len(x), num_classes, dtype=torch.int64, device=x.device)
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        active, done = list(range(len(x))), 0
        for look in looks:
            for first in range(done, look, rows):
                wanted = min(rows, look - first)
                used = buffer[: -(-wanted // BLOCK) * BLOCK]
                fill(used)
                features = _laid_out(split.linear(used)[:wanted])
                if hidden is None or len(hidden) != len(features):
                    hidden = torch.empty_like(features)
                for i in active:
                    logits = split.tail(torch.add(features, centres[i], out=hidden))
                    finite &= logits.isfinite().all()
                    counts[i] += sole_winners(logits)
            done = look
            for i in active:
                samples[i] = done
            if stop is not None:
                over = stop(counts[active].cpu(), done, torch.tensor(active))
                active = [i for i, enough in zip(active, over, strict=True) if not enough]
                if not active:
                    break
        check_finite(bool(finite))
        return counts.cpu(), samples
