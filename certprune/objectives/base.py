"""What an objective is: settings that map (model, x, y, progress) to a loss and the figures worth logging."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from certifiers.threat import threat

Fraction = Annotated[float, Field(ge=0, le=1)]
Figures = dict[str, Tensor]
# How far eps or a weight has come, in [0, 1]. In compiled steps a tensor until the ramp has ended: nothing is decided
# by its value, so that they are compiled twice at most.
Level = float | Tensor


class Settings(BaseModel):
    """Frozen and closed; a key that is not listed is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Objective(Settings):
    """A loss to minimise in any stage.

    ``objective(model, x, y, progress)`` gives the mean loss over the batch, a scalar to differentiate, and detached
    scalars to log. ``x`` is (batch, *shape) in [0, 1], ``y`` (batch,) int64; ``progress`` in [0, 1] says how far the
    stage is, and 1 means the final eps and weights, which is what validation uses. In training mode BatchNorm uses
    and updates the statistics of the clean batch where bounds are computed, and of each batch that the loss passes
    through the network where inputs are perturbed; never of a batch that only an attack sees.

    An objective with a field ``replays`` is given each minibatch so many times in a row by the training loop.
    """

    name: str

    def begin_epoch(self) -> None:
        """Forget what was carried from step to step: an epoch depends on nothing but the state at its start."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Figures]:
        raise NotImplementedError


class Ramp(Settings):
    """How eps and the weights move from their first to their final value, between two fractions of the stage.

    ``smooth`` starts like t^4 for a quarter of the ramp and goes on as the tangent line (as in CROWN-IBP's
    training, Zhang et al. 2020, arXiv 1906.06316): the first steps, which decide whether training diverges, are tiny.
    """

    start: Fraction = 0.0
    end: Fraction = 0.6
    shape: Literal["smooth", "linear"] = "smooth"

    @model_validator(mode="after")
    def _forward(self) -> Ramp:
        if self.end < self.start:
            raise ValueError(f"a ramp must end after it starts, but start is {self.start} and end {self.end}")
        return self

    def __call__(self, progress: float) -> float:
        """How much of the way is done, in [0, 1]; 1 from ``end`` on."""
        if progress >= self.end:
            return 1.0
        t = max(progress - self.start, 0.0) / (self.end - self.start)
        if self.shape == "linear":
            return t
        bend, power = 0.25, 4
        scale = 1 / (bend**power + power * bend ** (power - 1) * (1 - bend))
        if t < bend:
            return scale * t**power
        return scale * (bend**power + power * bend ** (power - 1) * (t - bend))


class Weight(Settings):
    """A weight that moves along the ramp; a tensor, as the ramp may be (see :data:`Level`), only where it moves."""

    start: Fraction = 1.0
    end: Fraction = 0.0

    def __call__(self, ramp: Level) -> Level:
        return self.start if self.start == self.end else self.start + (self.end - self.start) * ramp


def is_number(level: Level, value: float) -> bool:
    """Whether a level is just that number, so that work can be saved; of a tensor this is not asked."""
    return not isinstance(level, Tensor) and level == value


class RobustObjective(Objective):
    """An objective against a threat set: its final ``eps`` in pixels, its ``norm``, and the ramp towards them."""

    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    norm: Literal["linf", "l2"] = "linf"
    ramp: Ramp = Ramp()

    def threat_at(self, eps: Level, like: Tensor):
        return threat(self.norm, torch.as_tensor(eps, dtype=like.dtype, device=like.device))


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of right predictions, a detached scalar."""
    return (logits.argmax(1) == y).to(logits).mean().detach()


def clean_figures(logits: Tensor, y: Tensor) -> Figures:
    return {"clean_loss": F.cross_entropy(logits, y).detach(), "clean_accuracy": accuracy(logits, y)}
