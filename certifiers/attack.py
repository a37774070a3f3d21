"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083): look for a counterexample before proving.

An attack proves nothing by failing. By succeeding it proves that no certificate can exist: its result is an
input of the threat set that the network, as it stands, predicts wrongly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certifiers.errors import InputError
from certifiers.threat import LinfBall, Threat


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | None = None,
    loss: str = "margin",
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Inputs of the threat set that the model predicts as wrongly as could be found, shaped like `x`.

    The first restart begins at the clean input, from where the straight path is exact for a linear model; the
    others begin at random. An input is left alone once it is broken, and that counterexample is returned; for
    the others it is the iterate whose best wrong class comes nearest to the label, `x` itself included.

    Args:
        model: (batch, ...) -> logits (batch, classes). It runs in the mode it is in, and its parameters,
            their gradients and torch's global random numbers stay as they are (in train mode BatchNorm's
            running statistics move, as with any forward pass).
        x: (batch, ...), floats in [0, 1]. y: (batch,), class numbers.
        step_size: in pixel units; 2.5 * eps / steps if None. linf moves by the gradient's sign, l2 by the
            gradient scaled to length 1.
        loss: "margin", the best wrong logit minus logit[y], or "ce", the cross-entropy.
        seed, indices: the random start of an input depends on the seed, its number in `indices` (its place in
            the batch if None) and the restart: not on the batch, nor on the device.

    Raises:
        InputError: an unknown loss, a negative number of steps, or no restart.
    """
    return _search(_task(model, x, y, threat, steps, step_size), [loss] * restarts, seed, indices)


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    steps: int = 40,
    restarts: int = 2,
    step_size: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`pgd` with the two losses in turn, and its success tested anew: (x_adv, success).

    `start` (batch, ...): inputs of the threat set to begin at, in place of the clean ones.

    `success` (batch,) is True where `x_adv` lies in the threat set and one plain forward pass of the model on
    it gives finite logits whose largest is not the label's.
    """
    losses = [("margin", "ce")[restart % 2] for restart in range(restarts)]
    x_adv = _search(_task(model, x, y, threat, steps, step_size), losses, seed, indices, start)
    with torch.no_grad():
        logits = model(x_adv)
    wrong = (logits.argmax(1) != y) & logits.isfinite().all(1)
    return x_adv, wrong & threat.contains(x, x_adv)


_Loss = Callable[[Tensor, Tensor], Tensor]


class _Task(NamedTuple):
    """What is attacked, and how."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    steps: int
    step_size: float | Tensor


def _task(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int, step_size: float | None) -> _Task:
    size = 2.5 * threat.eps / max(steps, 1) if step_size is None else step_size
    return _Task(model, x.detach(), y, threat, steps, size)


class _Best(NamedTuple):
    """The worst input found so far for each clean one, and its best wrong logit minus the label's."""

    x: Tensor
    excess: Tensor

    def update(self, rows: Tensor, x: Tensor, excess: Tensor) -> None:
        better = excess > self.excess[rows]  # False for NaN
        self.x[rows[better]] = x[better]
        self.excess[rows[better]] = excess[better]

    def open(self) -> Tensor:
        """The rows that are not broken yet."""
        return (~(self.excess > 0)).nonzero().flatten()


def _search(
    task: _Task, losses: Sequence[str], seed: int, indices: Sequence[int] | None, first: Tensor | None = None
) -> Tensor:
    """Run one restart per entry of `losses`, the first from `first` (None: the clean inputs); the best inputs found."""
    _check(task.steps, losses)
    x = task.x
    indices = range(len(x)) if indices is None else indices
    if len(x) == 0 or (isinstance(task.threat.eps, int | float) and task.threat.eps == 0):
        return x.clone()  # nothing can be moved
    with torch.no_grad():
        excess = _margin_excess(task.model(x), task.y)
    best = _Best(x.clone(), excess.nan_to_num(nan=float("-inf"), posinf=float("inf")))
    for restart, loss in enumerate(losses):
        rows = best.open()
        if len(rows) == 0:
            break
        start = (x if first is None else first)[rows]
        if restart > 0:
            names = [f"{seed}/{indices[row]}/{restart}" for row in rows.tolist()]
            start = _random_start(start, task.threat.select(rows), names)
        _ascend(task, best, rows, start, _LOSSES[loss])
    return best.x


def _ascend(task: _Task, best: _Best, rows: Tensor, point: Tensor, loss: _Loss) -> None:
    """One restart from `point` for these rows of the task; what is found goes into `best`."""
    for step in range(task.steps + 1):
        last = step == task.steps
        with torch.set_grad_enabled(not last):
            point = point.detach().requires_grad_(not last)
            logits = task.model(point)
            excess = _margin_excess(logits, task.y[rows])
            best.update(rows, point.detach(), excess.detach())
            if last:
                return
            (gradient,) = torch.autograd.grad(loss(logits, task.y[rows]).sum(), point)
        keep = ~(excess.detach() > 0)
        rows, point, gradient = rows[keep], point.detach()[keep], gradient[keep]
        if len(rows) == 0:
            return
        size, threat = task.step_size, task.threat.select(rows)
        size = size[rows] if isinstance(size, Tensor) and size.dim() else size
        point = threat.project(task.x[rows], point + size * steepest(gradient, threat))


def steepest(gradient: Tensor, threat: Threat) -> Tensor:
    """The unit step of steepest ascent in the threat's norm; none where the gradient is 0 or not finite."""
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    if isinstance(threat, LinfBall):
        return gradient.sign()
    # Scaled by the largest entry first: the squares of a small gradient would vanish in float32.
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=0.5)).view_as(gradient)


def _random_start(x: Tensor, threat: Threat, names: Sequence[str]) -> Tensor:
    """A point of each input's threat set, drawn from its name: uniform in the ball, then projected."""
    noise = torch.empty(x.shape, dtype=x.dtype)
    generator = torch.Generator()
    for row, name in zip(noise, names, strict=True):
        generator.manual_seed(zlib.crc32(name.encode()))
        if isinstance(threat, LinfBall):
            row.uniform_(-1.0, 1.0, generator=generator)
        else:
            radius = torch.rand((), generator=generator, dtype=torch.float64) ** (1.0 / row.numel())
            row.normal_(generator=generator)
            row.mul_(radius.to(row.dtype) / row.norm())
    return threat.project(x, x + threat.eps * noise.to(x.device))


def _margin_excess(logits: Tensor, y: Tensor) -> Tensor:
    """(batch,): the largest wrong logit minus the label's; above 0 where the input is broken."""
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


_LOSSES: dict[str, _Loss] = {"margin": _margin_excess, "ce": _cross_entropy}


def _check(steps: int, losses: Sequence[str]) -> None:
    for loss in losses:
        if loss not in _LOSSES:
            raise InputError(f"The loss of an attack must be one of {', '.join(_LOSSES)}, not {loss!r}.")
    if steps < 0 or not losses:
        raise InputError(
            f"An attack needs 0 steps or more and 1 restart or more, but {steps} steps and {len(losses)} "
            "restarts were asked for."
        )
