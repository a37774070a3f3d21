"""Which weights of a layer are kept: the scores they are ranked by, and what is trained to find them.

A criterion gives each weight a score; the layer keeps the weights with the largest scores, as many as its
budget says. If it is `trained`, the scores are parameters and the mask follows them; else the mask is fixed
at once, or, where the sparsity grows, made anew from time to time. To add one: write a function
(weight, generator, gradients) -> scores of the weight's shape, and give it a line in `CRITERIA`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Gradients(NamedTuple):
    """Of the objective's loss by one effective weight tensor: its mean over batches, and that of its square."""

    mean: torch.Tensor
    square: torch.Tensor


@dataclass(frozen=True)
class Criterion:
    """Scores of one weight tensor, finite and of its shape, type and device; larger is kept.

    `trained`: the scores are trained with the objective's loss. `with_weights`: and all weights along with them.
    `gradients`: the scores need the loss's gradients. `in_loss_units`: scores of different layers can be compared
    as they are, since all of them estimate what the loss would change by.
    """

    scores: Callable[[torch.Tensor, torch.Generator | None, Gradients | None], torch.Tensor]
    trained: bool = False
    with_weights: bool = False
    gradients: bool = False
    in_loss_units: bool = False


def scaled_start(
    weight: torch.Tensor, generator: torch.Generator | None = None, gradients: Gradients | None = None
) -> torch.Tensor:
    """sqrt(6 / fan_in) * |w| / max|w|: HYDRA's scaled start of the scores (Sehwag et al. 2020).

    HYDRA starts from the signed weight and ranks |score|. With the straight-through gradient the two descend
    alike: d|s| = sign(s) ds, so |score| there and the score here take the same steps until a score reaches
    zero. There |score| is reflected and hovers about zero; the score here goes on below zero, so that it is
    ranked by how long training has wanted the weight gone. The order at the start is that of the magnitudes.
    """
    magnitudes = weight.abs()
    largest = magnitudes.max()
    # A layer of zeros has no order; equal scores keep its first weights.
    scale = torch.where(largest > 0, math.sqrt(6 / weight[0].numel()) / largest, torch.zeros_like(largest))
    return magnitudes * scale


def magnitude(
    weight: torch.Tensor, generator: torch.Generator | None = None, gradients: Gradients | None = None
) -> torch.Tensor:
    """|w|: the least magnitude goes first (LWM, Han et al. 2015)."""
    return weight.abs()


def uniform_random(
    weight: torch.Tensor, generator: torch.Generator | None, gradients: Gradients | None = None
) -> torch.Tensor:
    """Uniform numbers, drawn on the CPU so that a seed gives the same mask on every device."""
    return torch.rand(weight.shape, generator=generator).to(weight)


def snip(weight: torch.Tensor, generator: torch.Generator | None, gradients: Gradients) -> torch.Tensor:
    """|w dL/dw|, L the mean loss over the batches: the pull on the connection (SNIP, Lee et al., ICLR 2019)."""
    return (weight * gradients.mean).abs()


def taylor(weight: torch.Tensor, generator: torch.Generator | None, gradients: Gradients) -> torch.Tensor:
    """Mean of (w dL/dw)^2 over the batches: the squared change of the loss to first order (Molchanov et al. 2019)."""
    return weight.square() * gradients.square


def layer_adaptive(scores: torch.Tensor) -> torch.Tensor:
    """s^2 over the sum of all squares up to it, from the largest down (LAMP, Lee et al., ICLR 2021).

    The order inside a layer stays. Scores of different layers become comparable: invariant to a layer's scale, in
    (0, 1], 1 for the layer's best. Negative ones count as 0.
    """
    squares, order = scores.detach().flatten().clamp(min=0).square().sort(descending=True, stable=True)
    sums = squares.cumsum(0)
    shares = torch.where(sums > 0, squares / sums, torch.zeros_like(sums))
    return torch.empty_like(shares).scatter_(0, order, shares).view_as(scores)


CRITERIA: dict[str, Criterion] = {
    "joint": Criterion(scaled_start, trained=True, with_weights=True),
    "magnitude": Criterion(magnitude),
    "random": Criterion(uniform_random),
    "score": Criterion(scaled_start, trained=True),
    "snip": Criterion(snip, gradients=True, in_loss_units=True),
    "taylor": Criterion(taylor, gradients=True, in_loss_units=True),
}
