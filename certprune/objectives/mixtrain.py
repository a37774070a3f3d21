"""MixTrain (Wang et al. 2018, arXiv 1811.02625): clean training with tight bounds of a few images mixed in."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from certifiers.bounds import Network, Region, propagate, symbolic_margins, trace, worst_case_cross_entropy

from .base import Figures, Fraction, Ramp, RobustObjective, Weight, clean_figures
from .certified import share_certified

Count = Annotated[int, Field(ge=1)]


class MixTrain(RobustObjective):
    """``kappa * clean + (1 - kappa) * worst case``, the worst case by symbolic intervals of a few images.

    Stochastic robust approximation: a batch is bounded with ``probability``, and then ``images`` of it, drawn at
    random; otherwise the loss is the clean one. Tight bounds cost too much for every image, but a sample of them
    leads training the same way.

    Dynamic weight: ``kappa`` moves along ``kappa_ramp``, a ramp of its own: while eps grows the clean loss leads,
    and the verifiable loss takes over afterwards.

    Validation bounds the first ``validation_images`` of every batch; ``robust_loss`` and ``certified_accuracy`` are
    about these, and about the drawn images in training.
    """

    name: Literal["mixtrain"] = "mixtrain"
    images: Count = 5
    probability: Fraction = 0.8
    kappa: Weight = Weight(start=0.9, end=0.1)
    kappa_ramp: Ramp = Ramp(start=0.0, end=0.8, shape="linear")
    validation_images: Count = 16

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        eps, kappa = self.eps * self.ramp(progress), self.kappa(self.kappa_ramp(progress))
        # Bound with the whole batch: its statistics are BatchNorm's, and the weights are looked up once.
        network = trace(model, tuple(x.shape[1:])).bind(x)
        clean = F.cross_entropy(network.logits, y)
        figures = clean_figures(network.logits, y) | {"eps": torch.tensor(eps), "kappa": torch.tensor(kappa)}
        chosen = self._chosen(len(x))
        if chosen is None:
            return clean, figures
        robust, certified = self._worst_case(network, x[chosen], y[chosen], eps)
        figures |= {"robust_loss": robust.detach(), "certified_accuracy": certified}
        return kappa * clean + (1 - kappa) * robust, figures

    def _chosen(self, batch: int) -> Tensor | slice | None:
        """Which images are bounded; None if none of this batch."""
        if not torch.is_grad_enabled():
            return slice(self.validation_images)
        # Both are drawn in any case, so that the next batch's draw does not depend on the outcome.
        turn, order = torch.rand(()), torch.randperm(batch)
        return order[: self.images] if turn < self.probability else None

    def _worst_case(self, network: Network, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        margins = symbolic_margins(network, propagate(network, Region.of(x, self.threat_at(eps, x))), y)
        return worst_case_cross_entropy(margins, y).mean(), share_certified(margins, y).detach()
