"""TRADES (Zhang et al. 2019, arXiv 1901.08573): accuracy on clean inputs, traded for stability around them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .adversarial import AT_ONCE, Steps, StepSize
from .base import Figures, Ramp, RobustObjective, accuracy, clean_figures
from .perturb import ascend, attacking, draws

START = 0.001  # pixels: at the clean input itself the divergence is 0, and so is its gradient


class Trades(RobustObjective):
    """``cross_entropy(clean) + beta * KL(p(clean) || p(attacked))``, where the attack maximises the divergence.

    Unlike Madry's, the attack does not look at the label. As in the paper it starts from ``x`` and a little Gaussian
    noise and runs in evaluation mode (running statistics); then the clean and the attacked batch each pass through
    the network in the stage's own mode, so in train mode batch normalisation normalises each by its own statistics,
    and running statistics follow both. ``step_size`` is in pixel units, 2.5 * eps / steps if None.

    The figure ``attack_accuracy`` is under this attack, which may well make a prediction surer instead of wrong: read
    it as an upper bound, looser than that of objectives which attack the label.
    """

    name: Literal["trades"] = "trades"
    ramp: Ramp = AT_ONCE
    steps: Steps = 10
    step_size: StepSize | None = None
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        eps = self.eps * self.ramp(progress)
        attacked = self.attack(model, x, eps)
        clean, logits = model(x), model(attacked)
        apart = divergence(logits, clean).mean()
        figures = {
            **clean_figures(clean, y),
            "attack_accuracy": accuracy(logits, y),
            "divergence": apart.detach(),
            "eps": torch.tensor(eps),
        }
        return F.cross_entropy(clean, y) + self.beta * apart, figures

    def attack(self, model: nn.Module, x: Tensor, eps: float) -> Tensor:
        """Inputs of the threat set, detached, whose predictions are far from those on ``x``."""
        noise = torch.empty_like(x).normal_(generator=draws(x))
        with attacking(model, eval_mode=True):
            with torch.no_grad():
                clean = model(x)
            return ascend(
                lambda point: divergence(model(point), clean),
                x,
                self.threat_at(eps, x),
                self.steps,
                x + START * noise,
                self.step_size,
            )


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p(reference) || p(logits)) of each input, (batch,), from two tensors of logits (batch, classes)."""
    logarithms = F.log_softmax(reference, 1)
    return F.kl_div(F.log_softmax(logits, 1), logarithms, reduction="none", log_target=True).sum(1)
