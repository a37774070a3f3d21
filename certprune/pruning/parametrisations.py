"""The two masks as `torch.nn.utils.parametrize` parametrisations, and the top-k that they rest on."""

from __future__ import annotations

import torch
from torch import nn


def top_mask(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """True at exactly the `kept` largest finite scores; among equal ones the lower (row-major) index wins.

    Selection instead of sorting, and no synchronisation with a GPU. `topk`, since `kthvalue`, as fast
    on the CPU, has no deterministic version on CUDA.
    """
    flat = scores.detach().flatten()
    threshold = flat.topk(kept, sorted=False).values.amin()
    above = flat > threshold
    tied = flat == threshold
    wanted = kept - torch.count_nonzero(above)
    return (above | (tied & (tied.cumsum(0, dtype=torch.int32) <= wanted))).view_as(scores)


class ScoreMask(nn.Module):
    """weight -> weight * mask, where mask = 1 at exactly the `kept` largest `scores`.

    Forward is exact: mask + (scores - scores) is the mask to the bit while scores are finite. Backward is
    straight-through: d/dscores = g * weight and d/dweight = g * mask, g the effective weight's gradient
    (Ramanujan et al. 2020; HYDRA, Sehwag et al. 2020).
    """

    def __init__(self, scores: torch.Tensor, kept: int):
        super().__init__()
        self.scores = nn.Parameter(scores.detach().clone())
        self.kept = kept

    @property
    def mask(self) -> torch.Tensor:
        """The mask of the present scores, bool."""
        return top_mask(self.scores, self.kept)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (self.mask + (self.scores - self.scores.detach()))

    def extra_repr(self) -> str:
        return f"kept={self.kept} of {self.scores.numel()}"


class FixedMask(nn.Module):
    """weight -> weight * mask, for a mask that never changes (a bool buffer)."""

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
