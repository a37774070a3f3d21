"""The two masks as `torch.nn.utils.parametrize` parametrisations."""

from __future__ import annotations

import torch
from torch import nn

from certprune.pruning.patterns import Pattern


class ScoreMask(nn.Module):
    """weight -> weight * mask, where mask = 1 at exactly `kept` weights of the `pattern` with large `scores`.

    Forward is exact: mask + (scores - scores) is the mask to the bit while scores are finite. Backward is
    straight-through: d/dscores = g * weight and d/dweight = g * mask, g the effective weight's gradient
    (Ramanujan et al. 2020; HYDRA, Sehwag et al. 2020). `offset`, of learned budgets, is added to all scores of the
    layer where they are compared with other layers': its gradient is the sum of the scores' over `kept`, so that it
    moves at a score's pace.

    `kept` may be set anew between steps; it stands in the state, so that a restored mask is the one that was saved.
    """

    def __init__(self, scores: torch.Tensor, kept: int, pattern: Pattern | None = None, offset: bool = False):
        super().__init__()
        self.scores = nn.Parameter(scores.detach().clone())
        self.offset = nn.Parameter(scores.new_zeros(())) if offset else None
        self.kept = kept
        self.pattern = pattern or Pattern()

    @property
    def mask(self) -> torch.Tensor:
        """The mask of the present scores, bool."""
        return self.pattern.select(self.scores.detach(), self.kept)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        through = self.scores - self.scores.detach()
        if self.offset is not None:
            through = through + (self.offset - self.offset.detach()) / self.kept
        return weight * (self.mask + through)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.kept)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.kept = int(state)

    def extra_repr(self) -> str:
        return f"kept={self.kept} of {self.scores.numel()}"


class FixedMask(nn.Module):
    """weight -> weight * mask, for a mask (a bool buffer) that no gradient reaches."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    @property
    def kept(self) -> int:
        return int(torch.count_nonzero(self.mask))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask

    def extra_repr(self) -> str:
        return f"kept={self.kept} of {self.mask.numel()}"
