"""The selection that every mask rests on."""

from __future__ import annotations

import torch


def top_mask(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """True at exactly the `kept` largest scores (no NaN); among equal ones the lower (row-major) index wins.

    Selection instead of sorting, and no synchronisation with a GPU. `topk`, since `kthvalue`, as fast
    on the CPU, has no deterministic version on CUDA.
    """
    flat = scores.detach().flatten()
    threshold = flat.topk(kept, sorted=False).values.amin()
    above = flat > threshold
    tied = flat == threshold
    wanted = kept - torch.count_nonzero(above)
    return (above | (tied & (tied.cumsum(0, dtype=torch.int32) <= wanted))).view_as(scores)
