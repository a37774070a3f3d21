"""Between adversarial and certified training: MTL-IBP and CC-IBP (De Palma et al. 2024, arXiv 2305.13991).

Both are *expressive*: ``alpha`` takes them from the loss of attacked inputs (0), a lower bound of the worst case, to
the loss of interval bounds (1), an upper bound. A small ``alpha`` keeps more standard accuracy but asks for a
stronger verifier than interval bounds afterwards; the paper uses 0.004 to 0.5, the larger the larger eps.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, is_grad_enabled

from certifiers.bounds import Network, worst_case_cross_entropy

from .base import Figures, Fraction, Weight
from .certified import IBP, Bounded, attack
from .perturb import cross_entropy


class Expressive(IBP):
    """What both losses share: an attack beside the interval bounds, on the same network.

    There is no clean share by default (``kappa`` is 0 throughout), as in the paper: at the start of the ramp eps is
    0, and both losses are the clean cross-entropy anyway. Like it the attack starts at random; its one step of
    2.5 eps (2.5 eps / ``steps`` in general) ends in a corner of the ball wherever the gradient is not 0.
    Unlike it the attack sees the BatchNorm statistics of the clean batch, which also the bounds use.

    ``attack_eps_factor`` enlarges the radius of the attack, not of the bounds, and in training only (the paper's
    2.1 for CIFAR-10 at 2/255): validation attacks within eps.
    """

    kappa: Weight = Weight(start=0.0, end=0.0)
    alpha: Fraction = 0.5
    steps: Annotated[int, Field(ge=0)] = 1
    attack_eps_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def bound(self, network: Network, x: Tensor, y: Tensor, eps: float) -> Bounded:
        step = super().bound(network, x, y, eps)
        if eps == 0:
            return step._replace(adversarial=network.forward(x))
        threat = self.threat_at(eps * self.attack_eps_factor, x) if is_grad_enabled() else step.threat
        return step._replace(adversarial=network.forward(attack(network, x, y, threat, self.steps)))

    def robust_figures(self, step: Bounded, ibp: Tensor) -> Figures:
        right = step.adversarial.argmax(1) == step.y
        return super().robust_figures(step, ibp) | {"attack_accuracy": right.to(ibp).mean()}


class MTLIBP(Expressive):
    """``(1 - alpha) * cross-entropy of attacked inputs + alpha * worst-case cross-entropy by interval bounds``."""

    name: Literal["mtl_ibp"] = "mtl_ibp"

    def robust_loss(self, step: Bounded, ibp: Tensor, ramp: float) -> Tensor:
        adversarial = cross_entropy(step.adversarial, step.y)
        return (1 - self.alpha) * adversarial + self.alpha * worst_case_cross_entropy(ibp, step.y)


class CCIBP(Expressive):
    """The cross-entropy of ``(1 - alpha) * margins of attacked inputs + alpha * interval bounds of the margins``.

    Never above MTL-IBP's loss at the same attack: the cross-entropy is convex in the margins.
    """

    name: Literal["cc_ibp"] = "cc_ibp"

    def robust_loss(self, step: Bounded, ibp: Tensor, ramp: float) -> Tensor:
        margins = step.adversarial.gather(1, step.y.unsqueeze(1)) - step.adversarial
        return worst_case_cross_entropy((1 - self.alpha) * margins + self.alpha * ibp, step.y)
