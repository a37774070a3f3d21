"""Adversarial training (Madry et al. 2018, arXiv 1706.06083): the cross-entropy of attacked inputs."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Figures, Ramp, RobustObjective, accuracy, clean_figures
from .perturb import perturb

Steps = Annotated[int, Field(ge=1)]
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AT_ONCE = Ramp(start=0.0, end=0.0)


class Adversarial(RobustObjective):
    """``cross_entropy(model(x_adv), y)``, with ``x_adv`` by ``steps`` steps of projected gradient ascent.

    ``step_size`` is in pixel units, 2.5 * eps / steps if None. ``attack_mode`` says in which mode batch normalisation
    runs *during the attack*: "train", as the paper, normalises by the perturbed batch itself wherever the stage does
    (running statistics do not move); "eval" by the running statistics. The loss is one pass on ``x_adv`` in the
    stage's own mode, so running statistics are those of attacked inputs. Clean figures come with validation only:
    in training they would cost a pass of their own.
    """

    name: Literal["adversarial"] = "adversarial"
    ramp: Ramp = AT_ONCE
    steps: Steps = 7
    step_size: StepSize | None = None
    random_start: bool = True
    attack_mode: Literal["train", "eval"] = "train"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        eps = self.eps * self.ramp(progress)
        attacked = perturb(
            model,
            x,
            y,
            self.threat_at(eps, x),
            self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            eval_mode=self.attack_mode == "eval",
        )
        return attacked_loss(model, x, y, attacked, eps)


def attacked_loss(model: nn.Module, x: Tensor, y: Tensor, attacked: Tensor, eps: float) -> tuple[Tensor, Figures]:
    """The cross-entropy of ``attacked`` and its figures; in validation (gradients disabled) the clean ones, too."""
    logits = model(attacked)
    figures = {"attack_accuracy": accuracy(logits, y), "eps": torch.tensor(eps)}
    if not torch.is_grad_enabled():
        figures |= clean_figures(model(x), y)
    return F.cross_entropy(logits, y), figures
