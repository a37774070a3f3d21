"""What bounds leave open of one box: all that a complete search begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..bounds.graph import Network, trace
from ..bounds.interval import Intervals
from .bounding import intervals_of, tightened
from .query import Polytope


@dataclass(frozen=True)
class Left:
    """Is the output of an input between ``lower`` and ``upper`` (inputs,) in one of ``polytopes``?

    ``model``: float64, of flat inputs; ``network``: it, traced and bound. ``intervals``: boxes of all its nodes, by
    backward bounds, rounding accounted for. ``deadline``: of ``time.monotonic``.
    """

    model: nn.Module
    network: Network
    lower: Tensor
    upper: Tensor
    intervals: Intervals
    polytopes: Sequence[Polytope]
    deadline: float

    @staticmethod
    def of(model: nn.Module, lower: Tensor, upper: Tensor, polytopes: Sequence[Polytope], deadline: float) -> Left:
        """With nothing of it decided: the bounds are found first."""
        network = trace(model, tuple(lower.shape)).bind()
        intervals = tightened(network, intervals_of(network, lower.unsqueeze(0), upper.unsqueeze(0)))
        return Left(model, network, lower, upper, intervals, polytopes, deadline)
