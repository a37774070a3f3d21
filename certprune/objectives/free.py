"""Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843): the attack costs no pass of its own."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from certifiers.attack import steepest
from certifiers.threat import LinfBall, Threat

from .adversarial import AT_ONCE, StepSize, attacked_loss
from .base import Figures, Ramp, RobustObjective
from .perturb import perturb

VALIDATION_STEPS = 7  # as many as `adversarial` has, so that the two's epochs are judged alike


class Free(RobustObjective):
    """``cross_entropy(model(x + delta), y)``, each minibatch ``replays`` times in a row (the paper's m).

    The backward pass that trains the weights also gives the input's gradient, by which ``delta`` takes one step of
    ``step_size`` (pixels; eps if None) for the next call: the next replay, or the first one of the next minibatch.
    A new epoch begins at 0 (the paper carries on), and so does a batch of another shape. Batch normalisation sees
    perturbed batches only. An epoch has no more steps for the replays, but fewer minibatches (see the training loop).

    Validation attacks by projected gradient ascent instead, and carries nothing.
    """

    name: Literal["free"] = "free"
    ramp: Ramp = AT_ONCE
    replays: Annotated[int, Field(ge=1)] = 4
    step_size: StepSize | None = None
    _carried: Tensor | None = PrivateAttr(default=None)

    def begin_epoch(self) -> None:
        self._carried = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        eps = self.eps * self.ramp(progress)
        threat = self.threat_at(eps, x)
        if not torch.is_grad_enabled():
            return attacked_loss(model, x, y, perturb(model, x, y, threat, VALIDATION_STEPS), eps)
        before = self._carried
        delta = torch.zeros_like(x) if before is None or before.shape != x.shape else before
        point = threat.project(x, x + delta).requires_grad_(True)
        size = threat.eps if self.step_size is None else self.step_size

        def carry(gradient: Tensor) -> None:
            self._carried = into_ball(delta + size * steepest(gradient, threat), threat)

        point.register_hook(carry)
        return attacked_loss(model, x, y, point, eps)


def into_ball(delta: Tensor, threat: Threat) -> Tensor:
    """The nearest perturbation of each input that is no longer than eps, whatever the input."""
    if isinstance(threat, LinfBall):
        return delta.clamp(-threat.eps, threat.eps)
    length = delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.dim() - 1))
    return delta * (threat.eps / length.clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1.0)
