"""SABR, small adversarial bounding boxes (Mueller et al. 2023, arXiv 2210.04871).

Interval bounds of the whole threat set regularise more than the guarantee needs. SABR propagates only a small box
around an attacked input: its loss is no upper bound of the worst case, but the network keeps more accuracy, and a
verifier stronger than interval bounds can still prove it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from certifiers.bounds import Network, Region, interval_margins, propagate
from certifiers.bounds.operations import Interval
from certifiers.threat import LinfBall

from .base import Figures, Weight
from .certified import IBP, Bounded, attack, share_certified


class SABR(IBP):
    """The worst-case cross-entropy by interval bounds over a box of radius ``subselection * eps`` (the paper's lambda).

    Its centre is an attacked input (``steps`` gradient steps from a random point), moved so far towards the clean one
    that the box lies in the threat set; see :func:`small_box`. With ``subselection`` 1 the loss is IBP's.

    There is no clean share by default (``kappa`` is 0 throughout), as in the paper once eps grows: at the start of
    the ramp eps is 0, and the loss is the clean cross-entropy anyway. The attack sees the BatchNorm statistics of the
    clean batch, as the bounds do, and its last point is taken. ``warm_up`` looks at the small boxes.

    Figures: ``box_accuracy`` is the share of inputs certified on their small box, which proves nothing about the
    threat set; ``certified_accuracy``, over the whole threat set, is computed in validation only.
    """

    name: Literal["sabr"] = "sabr"
    norm: Literal["linf"] = "linf"
    kappa: Weight = Weight(start=0.0, end=0.0)
    subselection: Annotated[float, Field(gt=0, le=1)] = 0.4
    steps: Annotated[int, Field(ge=0)] = 8

    def bound(self, network: Network, x: Tensor, y: Tensor, eps: float) -> Bounded:
        threat = self.threat_at(eps, x)
        attacked = attack(network, x, y, threat, self.steps) if eps > 0 else x
        box = small_box(x, attacked, threat, self.subselection)
        return Bounded(network, propagate(network, Region(box)), x, y, threat)

    def robust_figures(self, step: Bounded, ibp: Tensor) -> Figures:
        figures = {"box_accuracy": share_certified(ibp, step.y)}
        if not torch.is_grad_enabled():
            whole = propagate(step.network, Region.of(step.x, step.threat))
            figures["certified_accuracy"] = share_certified(interval_margins(step.network, whole, step.y), step.y)
        return figures


def small_box(x: Tensor, attacked: Tensor, threat: LinfBall, share: float) -> Interval:
    """The box of radius ``share * eps`` around ``attacked``, inside the threat set of ``x``; shaped like ``x``.

    The centre is projected so that the box stays within ``x +- eps``, then the box is cut to [0, 1] as every threat
    set is. It still holds ``attacked``, which the projection moves by ``share * eps`` at most.
    """
    radius = share * threat.eps
    away = threat.eps - radius
    centre = torch.minimum(torch.maximum(attacked, x - away), x + away)
    lower, upper = threat.box(x)
    return Interval.between(torch.maximum(centre - radius, lower), torch.minimum(centre + radius, upper))
