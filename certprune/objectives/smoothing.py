"""Training for randomized smoothing: networks that keep their answer under Gaussian noise.

Noise has standard deviation ``sigma`` in pixel units and is never clipped to [0, 1], since the smoothed classifier
that is certified (Cohen et al. 2019, arXiv 1902.02918) is defined over all of it; normalisation is the model's own
first layer, behind the noise. Each validation draws the same noise again, so epochs are compared on equal terms.

Batch normalisation in training mode: the copies of a batch go through the network as one batch, and its statistics
are theirs, noise included, as in the papers' code.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Figures, Objective, clean_figures
from .perturb import draws

Deviation = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SmoothingObjective(Objective):
    """An objective whose network is to be smoothed with noise of standard deviation ``sigma`` (pixel units)."""

    sigma: Deviation


class Gaussian(SmoothingObjective):
    """The cross-entropy of ``samples`` noisy copies of each input (Cohen et al. 2019, arXiv 1902.02918)."""

    name: Literal["gaussian"] = "gaussian"
    samples: Annotated[int, Field(ge=1)] = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        logits = logits_of_copies(model, x, gaussian_noise(x, self.sigma, self.samples))
        loss = copies_cross_entropy(logits, y)
        return loss, noisy_figures(logits, y, self.sigma) | validation_figures(model, x, y)


class Stability(SmoothingObjective):
    """``CE(p(x), y) + beta * KL(p(x) || p(x + noise))``, p the softmax outputs.

    Stability training (Li et al. 2019, arXiv 1809.03113) in the form of Carmon et al. 2019 (arXiv 1905.13736), with
    which HYDRA prunes (Sehwag et al. 2020, arXiv 2002.10509). Gradients flow through both outputs. In training mode
    batch normalisation sees the clean and the noisy batch one after the other, each with its own statistics.
    """

    name: Literal["stability"] = "stability"
    beta: Amount = 6.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        clean = model(x)
        noisy = logits_of_copies(model, x, gaussian_noise(x, self.sigma, 1))
        apart = divergence(F.log_softmax(clean, 1), F.log_softmax(noisy, 2))
        loss = F.cross_entropy(clean, y) + self.beta * apart
        figures = clean_figures(clean, y) | noisy_figures(noisy, y, self.sigma)
        return loss, figures | {"stability_loss": apart.detach()}


class Consistency(SmoothingObjective):
    """``mean_i CE(p_i, y) + weight * mean_i KL(q || p_i) + entropy * H(q)`` over ``samples`` noisy copies.

    p_i are the softmax outputs of the copies and q is their mean, so the second term asks the copies to agree and the
    third asks them to be sure: consistency regularisation (Jeong & Shin 2020, arXiv 2006.04062; ``weight`` is
    its lambda, ``entropy`` its eta).
    """

    name: Literal["consistency"] = "consistency"
    samples: Annotated[int, Field(ge=2)] = 2
    weight: Amount = 10.0
    entropy: Amount = 0.5

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        logits = logits_of_copies(model, x, gaussian_noise(x, self.sigma, self.samples))
        mean = smoothed_log_probabilities(logits)
        apart = divergence(mean, F.log_softmax(logits, 2))
        doubt = -(mean.exp() * mean).sum(1).mean()
        loss = copies_cross_entropy(logits, y) + self.weight * apart + self.entropy * doubt
        figures = noisy_figures(logits, y, self.sigma) | validation_figures(model, x, y)
        return loss, figures | {"consistency_loss": apart.detach(), "entropy": doubt.detach()}


def gaussian_noise(x: Tensor, sigma: float, samples: int) -> Tensor:
    """(samples, *x.shape) from N(0, sigma^2); the same at each call while gradients are disabled."""
    return sigma * torch.randn((samples, *x.shape), generator=draws(x), dtype=x.dtype, device=x.device)


def logits_of_copies(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """(samples, batch, classes): the outputs at ``x + noise``, unclipped, in one pass; noise (samples, *x.shape)."""
    return model((x + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])


def smoothed_log_probabilities(logits: Tensor) -> Tensor:
    """(batch, classes): the logarithm of the copies' mean softmax; ``logits`` (samples, batch, classes)."""
    return F.log_softmax(logits, 2).logsumexp(0) - math.log(len(logits))


def copies_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy over all copies of all inputs; ``logits`` (samples, batch, classes)."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))


def copies_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of all copies of all inputs that are classified right; ``logits`` (samples, batch, classes)."""
    return (logits.argmax(2) == y).to(logits).mean().detach()


def divergence(centre: Tensor, others: Tensor) -> Tensor:
    """The mean over copies and inputs of ``KL(centre || other)``; log-probabilities (batch, K), (samples, batch, K)."""
    return F.kl_div(others, centre.expand_as(others), reduction="none", log_target=True).sum(2).mean()


def noisy_figures(logits: Tensor, y: Tensor, sigma: float) -> Figures:
    """What every smoothing objective reports of its noisy copies; ``logits`` (samples, batch, classes)."""
    return {
        "noisy_loss": copies_cross_entropy(logits, y).detach(),
        "noisy_accuracy": copies_accuracy(logits, y),
        "sigma": torch.tensor(sigma),
    }


def validation_figures(model: nn.Module, x: Tensor, y: Tensor) -> Figures:
    """The clean figures in validation; none in training, where a clean pass costs time and moves batch statistics."""
    return {} if torch.is_grad_enabled() else clean_figures(model(x), y)
