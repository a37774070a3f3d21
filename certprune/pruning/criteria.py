"""Which weights of a layer are kept: the scores they are ranked by, and whether these are trained.

A criterion gives each weight a score; the layer keeps the weights with the largest scores, as many as its
budget says. If it is `trained`, the scores are parameters and the mask follows them; else the mask is fixed
at once. To add one: write a function (weight, generator) -> scores of the weight's shape, and give it a line
in `CRITERIA`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Criterion:
    """Scores of one weight tensor, finite and of its shape, type and device; larger is kept."""

    scores: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    trained: bool


def scaled_start(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
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


def magnitude(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """|w|: the least magnitude goes first (LWM, Han et al. 2015)."""
    return weight.abs()


def uniform_random(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers, drawn on the CPU so that a seed gives the same mask on every device."""
    return torch.rand(weight.shape, generator=generator).to(weight)


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, trained=False),
    "random": Criterion(uniform_random, trained=False),
    "score": Criterion(scaled_start, trained=True),
}
