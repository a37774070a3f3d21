"""Adversarial training of the smoothed classifier (Salman et al. 2019, arXiv 1906.04584)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from certifiers.threat import L2Ball

from .base import Figures, Ramp
from .perturb import perturb
from .smoothing import (
    Amount,
    SmoothingObjective,
    copies_accuracy,
    copies_cross_entropy,
    gaussian_noise,
    logits_of_copies,
    noisy_figures,
    smoothed_log_probabilities,
    validation_figures,
)


class SmoothAdv(SmoothingObjective):
    """The cross-entropy of noisy copies of images that were perturbed against the smoothed classifier.

    The attack (SmoothAdv-PGD) climbs ``-log mean_i p_y(x + delta + noise_i)``, the loss of the soft smoothed
    classifier, with the same ``samples`` noise draws in all its steps; the network then trains on just these copies.
    ``delta`` stays in the l2 ball of radius ``attack_eps`` (pixel units) and x + delta in [0, 1]; the noise upon it is
    not clipped. During the attack the network is in evaluation mode, as in the authors' code; the training pass uses
    (and updates) the statistics of the perturbed noisy batch.

    ``attack_eps`` is no threat that is certified: certified radii follow from ``sigma``. ``step_size`` is
    2 * attack_eps / steps unless given. With a ``ramp`` attack_eps grows first (the paper's warm-up); by default not.
    """

    name: Literal["smoothadv"] = "smoothadv"
    samples: Annotated[int, Field(ge=1)] = 2
    attack_eps: Amount
    steps: Annotated[int, Field(ge=0)] = 4
    step_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ramp: Ramp = Ramp(end=0.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        eps = self.attack_eps * self.ramp(progress)
        noise = gaussian_noise(x, self.sigma, self.samples)
        attacked = perturb(
            SoftSmoothed(model, noise),
            x,
            y,
            L2Ball(eps),
            self.steps,
            step_size=2 * eps / max(self.steps, 1) if self.step_size is None else self.step_size,
            random_start=False,
            eval_mode=True,
        )
        logits = logits_of_copies(model, attacked, noise)
        loss = copies_cross_entropy(logits, y)
        figures = {"attack_accuracy": copies_accuracy(logits, y), "attack_eps": torch.tensor(eps)}
        if torch.is_grad_enabled():
            return loss, figures | {"sigma": torch.tensor(self.sigma)}
        figures |= noisy_figures(logits_of_copies(model, x, noise), y, self.sigma)
        return loss, figures | validation_figures(model, x, y)


class SoftSmoothed(nn.Module):
    """The soft smoothed classifier over fixed noise: x -> the logarithm of the copies' mean softmax.

    Its cross-entropy is that of the mean probabilities, since log-softmax leaves log-probabilities as they are.
    """

    def __init__(self, model: nn.Module, noise: Tensor):
        super().__init__()
        self.model, self.noise = model, noise
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return smoothed_log_probabilities(logits_of_copies(self.model, x, self.noise))
