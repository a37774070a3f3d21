"""The warm-up regularisers of Shi et al. 2021 (arXiv 2103.17268), which keep interval bounds from exploding.

While eps grows they pull two quantities of every ReLU layer into a healthy range: how much wider its boxes are
than the input's, and how evenly its units divide into active and inactive ones.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from certifiers.bounds import Intervals, Network
from certifiers.bounds.nonlinear import ReLU

from .base import Settings


class WarmUp(Settings):
    """``weight`` of the regularisers at the start of the ramp (0 at its end); ``tolerance``: the paper's tau."""

    weight: Annotated[float, Field(ge=0)] = 0.5
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def loss(self, network: Network, intervals: Intervals) -> Tensor:
        """The mean over ReLU layers of the paper's L_tightness and L_relu, a scalar in units of tolerance."""
        inputs = [n.inputs[0] for n, op in zip(network.nodes, network.operations, strict=True) if isinstance(op, ReLU)]
        boxes = [intervals.boxes[i] for i in inputs]
        width = intervals.boxes[0].radius.mean()
        terms = [torch.relu(self.tolerance - _ratio(width, box.radius.mean())) for box in boxes]
        terms += [self._imbalance(box.centre) for box in boxes]
        return torch.stack(terms).sum() / (self.tolerance * max(len(boxes), 1))

    def _imbalance(self, centre: Tensor) -> Tensor:
        """How far the units of a layer with centres above 0 and those below are from the same mean and variance.

        The paper leaves out units whose box holds 0; without them, a trial's network was no better.
        """
        # By sums and dot products: written with masks, these few figures cost as much as the bounds themselves.
        active = centre.clamp(min=0).flatten()
        inactive = active - centre.flatten()
        sums = active.sum(), -inactive.sum()
        mean = (sums[0] + sums[1]) / centre.numel()
        count = (active > 0).sum()
        counts = count, centre.numel() - count
        # sum of (c - mean)^2 over a part = sum of c^2 - 2 mean * sum of c + count * mean^2
        squares = (
            torch.dot(part, part) - mean * (2 * total - number * mean)
            for part, total, number in zip((active, inactive), sums, counts, strict=True)
        )
        means = _ratio(*_balanced(sums[0], -sums[1]))
        spread = _ratio(*_balanced(*squares))
        return torch.relu(self.tolerance - means) + torch.relu(self.tolerance - spread)


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(a, b), torch.maximum(a, b)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a / b.clamp(min=1e-12)
