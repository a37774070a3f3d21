"""Where the kept weights of a layer may lie: anywhere, N of every M in a row, or whole output channels.

To add one: a subclass of :class:`Pattern`, and a line in :func:`pattern_of`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from certifiers.errors import InputError
from certprune.pruning.top import top_mask
from certprune.registry import unknown_name


class Pattern:
    """Unstructured: any weights. The base of the others."""

    def check(self, model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
        """Raise InputError if one of the `chosen` layers of `model` cannot have the pattern."""

    def cap(self, shape: torch.Size) -> int:
        """The most weights of such a layer that the pattern lets stay; a budget that needs more goes without it."""
        return math.prod(shape)

    def whole(self, kept: int, shape: torch.Size) -> int:
        """The number of weights nearest to `kept` that the pattern can keep, at least one of its units."""
        return kept

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores by which a budget should compare this layer's weights with those of others."""
        return scores

    def select(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """The mask, True at `kept` weights (a number that :meth:`whole` gives) with large scores."""
        return top_mask(scores, kept)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most N weights in every M that follow each other in a row of the weight as a matrix (out, in * kernel).

    2:4 is what torch's semi-structured kernels take (`torch.sparse.to_sparse_semi_structured` of a linear layer's
    weight, or of a convolution's as it multiplies unfolded patches). All of the layers' groups are full at sparsity
    1 - N/M; at a higher one the budget takes the best of those N. As long as a growing sparsity is below 1 - N/M,
    the weights that the pattern will let stay go last.
    """

    n: int
    m: int

    def check(self, model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
        for name, layer in chosen.items():
            row = layer.weight[0].numel()
            if row % self.m:
                raise InputError(
                    f"The pattern {self.n}:{self.m} needs rows of a multiple of {self.m} weights, but those of "
                    f"{name!r} have {row}. Exclude it (prune.exclude: [{name}]), or use an M that divides {row}."
                )

    def cap(self, shape: torch.Size) -> int:
        return math.prod(shape) * self.n // self.m

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~self._allowed(scores), -math.inf)

    def select(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        allowed = self._allowed(scores)
        cap = self.cap(scores.shape)
        if kept <= cap:
            return top_mask(scores.masked_fill(~allowed, -math.inf), kept)
        return allowed | top_mask(scores.masked_fill(allowed, -math.inf), kept - cap)

    def _allowed(self, scores: torch.Tensor) -> torch.Tensor:
        """The N best of each group; among equal ones the first."""
        best = scores.detach().reshape(-1, self.m).sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        allowed = torch.zeros_like(scores, dtype=torch.bool).view(-1, self.m).scatter_(1, best, True)
        return allowed.view_as(scores)


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole output channels of convolutions and units of linear layers, by the mean score of their weights.

    A layer keeps the number of channels nearest to its budget, at least one: the total is met to half a channel a
    layer. Biases stay, so a channel that is gone is a constant, which compaction takes out with the weights that
    read it.
    """

    def check(self, model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
        from certprune.pruning.channels import check_channels

        check_channels(model, chosen)

    def whole(self, kept: int, shape: torch.Size) -> int:
        size = math.prod(shape[1:])
        return min(max(1, (2 * kept + size) // (2 * size)), shape[0]) * size

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        means = scores.flatten(1).mean(1)
        return means.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)

    def select(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        chosen = top_mask(scores.flatten(1).mean(1), kept // scores[0].numel())
        return chosen.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores).clone()


def pattern_of(name: str) -> Pattern:
    """The pattern called `name`: "unstructured", "channels", or "N:M" with 1 <= N < M; else InputError."""
    if name == "unstructured":
        return Pattern()
    if name == "channels":
        return Channels()
    found = re.fullmatch(r"(\d+):(\d+)", name) if isinstance(name, str) else None
    if not found:
        raise unknown_name("pattern", name, ["unstructured", "channels"], more=", or N:M, say 2:4")
    n, m = map(int, found.groups())
    if not 1 <= n < m:
        raise InputError(f"A pattern N:M keeps N weights of every M, with 1 <= N < M, say 2:4, but {name!r} came.")
    return NofM(n, m)
