"""How the stages of a recipe train: optimizers, learning rates, and how masks are found."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from certprune.settings import Fraction, Positive, Rate, Settings, Whole


class Adam(Settings):
    """Adam. With ``weight_decay`` it is AdamW: the decay is applied to the weights, not to the gradient."""

    name: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Rate = 0.0


class SGD(Settings):
    """Stochastic gradient descent with Nesterov momentum (none if ``momentum`` is 0)."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0


class Constant(Settings):
    """The learning rate stays."""

    name: Literal["constant"]


class Cosine(Settings):
    """Half a cosine from the learning rate down to ``final`` times it."""

    name: Literal["cosine"] = "cosine"
    final: Fraction = 0.0


class Step(Settings):
    """The learning rate is multiplied by ``factor`` at each milestone, a fraction of the stage."""

    name: Literal["step"]
    milestones: Annotated[tuple[Fraction, ...], Field(strict=False)] = (0.6, 0.85)
    factor: Annotated[float, Field(gt=0, le=1)] = 0.2


Optimizer = Annotated[Adam | SGD, Field(discriminator="name")]
Schedule = Annotated[Constant | Cosine | Step, Field(discriminator="name")]


class SpeedSettings(Settings):
    """How training steps use the machine; validation and certification are untouched.

    ``bf16``: layers by autocast in bfloat16, for objectives that look at logits, not at bounds. ``channels_last``:
    weights in that layout. ``compile``: steps by torch.compile, or as they are where that fails. ``accumulate``: each
    batch in so many parts, one after the other, for a batch that does not fit into memory.
    """

    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    accumulate: Positive = 1


# Of these the weights are the same, rounding apart, as on another machine; the others count as another training.
SAME_WEIGHTS = frozenset({"channels_last", "compile"})


class StageSettings(Settings):
    """How one stage trains.

    ``ramp``: whether the objective's eps and weights grow over the stage (else they are final throughout).
    ``objective``: changes to the recipe's objective for this stage alone; another ``name`` replaces it.
    """

    epochs: Whole = 8
    batch_size: Positive = 256
    optimizer: Optimizer = Adam()
    schedule: Schedule = Cosine()
    clip_gradient: Annotated[float, Field(gt=0)] | None = 8.0
    ramp: bool = False
    objective: dict[str, Any] | None = None


class PretrainSettings(StageSettings):
    """The dense network from its first weights; here the ramp is on."""

    epochs: Whole = 20
    ramp: bool = True


class Growth(Settings):
    """How sparsity grows in gradual variants: as 1 - (1 - t)^power, t from 0 at ``start`` to 1 at ``end``, fractions
    of the prune stage."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=0.95)] = 0.6
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0

    @model_validator(mode="after")
    def _forward(self):
        if self.end <= self.start:
            raise ValueError(f"growth must end after it starts, but start is {self.start} and end {self.end}")
        return self


class PruneSettings(StageSettings):
    """How masks are found. ``layers``: names or patterns to prune (null: all); ``exclude``: to spare.

    ``optimizer`` trains the scores; ``weights`` trains weights and biases, where a variant's criterion or schedule
    trains them too. ``growth`` is for gradual variants, ``rounds`` for iterative ones. Masks that move without being
    trained, and budgets that compare scores, are set anew every ``every`` steps. ``batches``: how many the criteria
    that rank by gradients see before a one-shot pruning.
    """

    epochs: Whole = 4
    optimizer: Optimizer = SGD(name="sgd")  # as HYDRA trains scores; Adam loses points at high sparsity
    layers: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    weights: Optimizer = Adam()
    growth: Growth = Growth()
    rounds: Positive = 3
    every: Positive = 10
    batches: Positive = 8
