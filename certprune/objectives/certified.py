"""Certified training by interval bounds (IBP) and by CROWN-IBP: minimise what can be proven."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from certifiers.bounds import (
    Intervals,
    Network,
    Region,
    fused_loss,
    interval_margins,
    linear_margins,
    needs_clean_batch,
    propagate,
    trace,
    worst_case_cross_entropy,
)
from certifiers.threat import Threat

from .base import Figures, Level, RobustObjective, Weight, clean_figures, is_number
from .perturb import ascend, cross_entropy, random_point
from .warmup import WarmUp


class Bounded(NamedTuple):
    """One step's network with its boxes, shared by every bound of the step.

    ``adversarial``: the logits of attacked inputs, ``(batch, classes)``, for objectives that attack.
    """

    network: Network
    intervals: Intervals
    x: Tensor
    y: Tensor
    threat: Threat
    adversarial: Tensor | None = None


class IBP(RobustObjective):
    """``kappa * clean + (1 - kappa) * worst case``, the worst case by interval bounds (Gowal et al. 2018).

    ``kappa`` moves along the ramp with eps. ``warm_up`` weighs the regularisers of Shi et al. 2021 while eps grows
    (see :class:`~certprune.objectives.warmup.WarmUp`). ``l1`` weighs the sum of the absolute values of all weights, as
    far as masks leave them, in training steps alone; 1e-6 to 1e-5 is usual (De Palma et al. 2024).
    """

    name: Literal["ibp"] = "ibp"
    kappa: Weight = Weight()
    warm_up: WarmUp = WarmUp()
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        return self.at(model, x, y, self.ramp(progress))

    def at(self, model: nn.Module, x: Tensor, y: Tensor, ramp: Level) -> tuple[Tensor, Figures]:
        """The same where the ramp has come so far; what a compiled step calls."""
        eps, kappa = self.eps * ramp, self.kappa(ramp)
        graph, mixed = trace(model, tuple(x.shape[1:])), not is_number(kappa, 0)
        clean = mixed or needs_clean_batch(model) or not torch.is_grad_enabled()
        network = graph.bind(x if clean else None)
        step = self.bound(network, x, y, eps)

        ibp = interval_margins(network, step.intervals, y)
        robust = self.robust_loss(step, ibp, ramp).mean()
        figures = {"robust_loss": robust.detach()} | self.robust_figures(step, ibp.detach())
        loss = robust
        if clean:
            figures |= clean_figures(network.logits, y)
            if mixed:
                loss = kappa * F.cross_entropy(network.logits, y) + (1 - kappa) * robust
        if self.warm_up.weight and not is_number(ramp, 1):
            extra = self.warm_up.loss(network, step.intervals)
            loss = loss + self.warm_up.weight * (1 - ramp) * extra
            figures["warm_up_loss"] = extra.detach()
        if self.l1 and torch.is_grad_enabled():
            loss = loss + self.l1 * network.size()
        figures |= {"eps": torch.as_tensor(eps), "kappa": torch.as_tensor(kappa)}
        return loss, figures

    def bound(self, network: Network, x: Tensor, y: Tensor, eps: Level) -> Bounded:
        """The boxes of this step, and what else the robust loss is made of."""
        threat = self.threat_at(eps, x)
        return Bounded(network, propagate(network, Region.of(x, threat)), x, y, threat)

    def robust_loss(self, step: Bounded, ibp: Tensor, ramp: Level) -> Tensor:
        """What to minimise, (batch,): upper bounds of the worst-case cross-entropy; ``ibp``: the interval margins."""
        return worst_case_cross_entropy(ibp, step.y)

    def robust_figures(self, step: Bounded, ibp: Tensor) -> Figures:
        """Detached scalars about the threat set; ``ibp``: the interval margins."""
        return {"certified_accuracy": share_certified(ibp, step.y)}


class CrownIBP(IBP):
    """IBP with a backward linear bound mixed in (Zhang et al. 2020, arXiv 1906.06316).

    ``beta`` is the share of CROWN-IBP in the bound, the rest is IBP; it moves along the ramp. With ``fusion`` the
    loss itself is bounded in one backward row (Xu et al. 2020), and the two losses are mixed; without, the
    margins are (K-1 rows, several times slower).
    """

    name: Literal["crown_ibp"] = "crown_ibp"
    beta: Weight = Weight()
    fusion: Annotated[bool, Field()] = True

    def robust_loss(self, step: Bounded, ibp: Tensor, ramp: Level) -> Tensor:
        beta = self.beta(ramp)
        if is_number(beta, 0):
            return worst_case_cross_entropy(ibp, step.y)
        if self.fusion:
            fused = fused_loss(step.network, step.intervals, step.y)
            return fused if is_number(beta, 1) else beta * fused + (1 - beta) * worst_case_cross_entropy(ibp, step.y)
        linear = linear_margins(step.network, step.intervals, step.y)
        return worst_case_cross_entropy(beta * linear + (1 - beta) * ibp, step.y)


def attack(network: Network, x: Tensor, y: Tensor, threat: Threat, steps: int) -> Tensor:
    """Inputs of the threat set, detached, with a raised cross-entropy: projected gradient steps from a random point.

    The network attacked is the one whose loss is minimised: with the effective weights of the step, and with
    BatchNorm statistics of the clean batch where BatchNorm is in training mode.
    """
    return ascend(lambda point: cross_entropy(network.forward(point), y), x, threat, steps, random_point(x, threat))


def share_certified(margins: Tensor, y: Tensor) -> Tensor:
    """The share of inputs whose margins are all positive, a scalar."""
    others = torch.ones_like(margins, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)
    return ((margins > 0) | ~others).all(1).to(margins).mean()
