"""BatchNorm whose training statistics are those of all processes' parts of the batch together.

So the network that several processes train is the one that a single process trains on the whole batches. The
gradients of the statistics go through all processes, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from certifiers.bounds.layers import BatchStatistics, normalisation, update_running
from certifiers.errors import InputError
from certprune.parallel import world


class _Synchronised(BatchStatistics):
    """What a BatchNorm of :func:`synchronised` does in training mode; else it is as it was."""

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and (biased) variance by channel of the whole batch, and how many numbers each is of.

        ``x``: this process's part, ``(part, channels, ...)``, as large as every other's.
        """
        axes = [0, *range(2, x.dim())]
        parts = world().all_of(torch.stack([x.mean(axes), x.var(axes, unbiased=False)]))
        means, variances = parts.unbind(1)  # of equal parts: within them, and between them
        mean, between = means.mean(0), means.var(0, unbiased=False)
        return mean, variances.mean(0) + between, len(parts) * x.numel() // x.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # statistics of many small terms
        mean, var, count = self.batch_statistics(exact)
        update_running(self, mean.detach(), var.detach(), count)
        scale, shift = normalisation(mean, var, self.weight, self.bias, self.eps)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return (exact * scale.view(shape) + shift.view(shape)).to(x.dtype)


class SynchronisedBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """nn.BatchNorm1d over all processes."""


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes."""


class SynchronisedBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """nn.BatchNorm3d over all processes."""


_KINDS = {
    nn.BatchNorm1d: SynchronisedBatchNorm1d,
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
}


@contextlib.contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Inside, every BatchNorm of ``model`` takes its training statistics over all processes; alone, nothing changes.

    All processes must pass the same number of batches of the same size through the network. Parameters, buffers and
    their names stay. Raises InputError for a BatchNorm with a forward pass of its own.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = norms if world().size > 1 else []
    for module in norms:
        if type(module) not in _KINDS:
            raise InputError(
                f"sync_batch_norm is for torch's BatchNorm1d, 2d and 3d, but the network has a "
                f"{type(module).__name__}. Use one of these in its place, or leave out sync_batch_norm."
            )
    kinds = [type(module) for module in norms]
    try:
        for module, kind in zip(norms, kinds, strict=True):
            module.__class__ = _KINDS[kind]
        yield
    finally:
        for module, kind in zip(norms, kinds, strict=True):
            module.__class__ = kind


def is_synchronised(model: nn.Module) -> bool:
    """Whether ``model`` is inside :func:`synchronised`, with other processes to ask."""
    return any(isinstance(module, _Synchronised) for module in model.modules())
