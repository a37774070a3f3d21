"""Perturbed batches for training: fast projected gradient ascent over the whole batch (Madry et al. 2018).

For training only: a short attack of fixed length, without restarts, whose batch is perturbed together. What is
reported as a network's accuracy under attack comes from :mod:`certifiers.attack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certifiers.attack import steepest
from certifiers.threat import LinfBall, Threat

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each input, (batch,)."""
    return F.cross_entropy(logits, y, reduction="none")


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    steps: int,
    *,
    step_size: float | Tensor | None = None,
    random_start: bool = True,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
    eval_mode: bool = False,
) -> Tensor:
    """Inputs of the threat set, shaped like ``x`` and detached, on which ``loss`` was driven up.

    Batch normalisation: with ``eval_mode`` every module runs in evaluation mode during the attack (running
    statistics); without, each in the mode it is in (in train mode: the statistics of the perturbed batch at hand).
    Either way modes, buffers and running statistics, parameters and their ``grad`` are afterwards as before.

    Args:
        x: (batch, ...) in [0, 1]. y: whatever ``loss`` compares the logits with, (batch,) labels or (batch, ...).
        step_size: in pixel units; 2.5 * eps / steps if None. linf moves by the gradient's sign, l2 by the gradient
            scaled to length 1.
        random_start: begin at a uniformly drawn point of the ball (see :func:`draws` for the generator), else at x.
        start: begin there instead (projected into the threat set first).
        loss: (logits, y) -> (batch,).
    """
    if start is None:
        start = random_point(x, threat) if random_start else x
    with attacking(model, eval_mode):
        return ascend(lambda point: loss(model(point), y), x, threat, steps, start, step_size)


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: Threat,
    steps: int,
    start: Tensor,
    step_size: float | Tensor | None = None,
) -> Tensor:
    """``steps`` projected steps up ``objective``, a function of the input that gives (batch,); the last point.

    The building block of :func:`perturb` for attacks whose loss is not one pass over the logits. Call it inside
    :func:`attacking`. Works with gradients disabled, too.
    """
    size = 2.5 * threat.eps / max(steps, 1) if step_size is None else step_size
    x = x.detach()
    point = threat.project(x, start.detach())
    for _ in range(steps):
        point.requires_grad_(True)
        with torch.enable_grad():
            # Only with regard to the input: neither weights' gradients nor their .grad come into it.
            (gradient,) = torch.autograd.grad(objective(point).sum(), point)
        point = threat.project(x, point.detach() + size * steepest(gradient, threat))
    return point.detach()


@contextmanager
def attacking(model: nn.Module, eval_mode: bool = False) -> Iterator[None]:
    """Inside, forward passes leave no trace in ``model`` and do not know its parameters' gradients.

    Parameters require no gradient inside, so masked weights are the same at each read and are computed once; this
    must not be used inside another ``parametrize.cached()``. The buffers of modules in train mode are copies, so
    that running statistics move on the copies (copying back would spoil graphs that saved the originals).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept: list[tuple[nn.Module, str, Tensor]] = []
    if not eval_mode:
        kept = [
            (module, name, buffer)
            for module in model.modules()
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
    with frozen_modes(model) if eval_mode else nullcontext():
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for module, name, buffer in kept:
                module._buffers[name] = buffer.clone()
            with parametrize.cached():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, name, buffer in kept:
                module._buffers[name] = buffer


@contextmanager
def frozen_modes(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each one's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def draws(x: Tensor) -> torch.Generator | None:
    """The generator for an objective's noise on ``x``'s device, to pass as ``generator=``.

    None, torch's global one, while gradients are enabled: the training loop seeds it. A new one from a fixed seed
    otherwise, so that validation compares epochs on the same noise.
    """
    if torch.is_grad_enabled():
        return None
    return torch.Generator(device=x.device).manual_seed(0)


def random_point(x: Tensor, threat: Threat) -> Tensor:
    """A point drawn uniformly from each input's ball, then projected into its threat set."""
    generator = draws(x)
    if isinstance(threat, LinfBall):
        noise = torch.empty_like(x).uniform_(-1.0, 1.0, generator=generator)
    else:
        direction = torch.empty_like(x).normal_(generator=generator).flatten(1)
        radius = torch.rand(len(x), 1, generator=generator, dtype=x.dtype, device=x.device) ** (1 / x.shape[1:].numel())
        noise = (direction * (radius / direction.norm(dim=1, keepdim=True))).view_as(x)
    return threat.project(x, x + threat.eps * noise)
