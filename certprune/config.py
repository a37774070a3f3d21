"""The schema of a recipe: what may stand in a YAML file, and what each key means.

A recipe is frozen once it is loaded. Unknown keys, wrong types and impossible values are
:class:`~certifiers.errors.InputError`; the message holds one line per mistake and all mistakes at once (see
:mod:`certprune.recipes` for loading, inheritance and the wording of errors).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from certprune.certify_settings import CertifySettings, SmoothingSettings
from certprune.settings import Named, Positive, Settings, Whole
from certprune.stage_settings import PretrainSettings, PruneSettings, SpeedSettings, StageSettings
from certprune.variant_names import default_name

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
RESERVED = ("pretrain", "certificates")


class DataSettings(Named):
    """``validation``: the fraction of the training images set aside for choosing the best epoch."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1


class VariantSettings(Settings):
    """One network to make out of the pretrained one: pruned by a criterion, or ``dense`` as the yardstick.

    ``schedule``: the sparsity from the start ("one_shot"), growing over the prune stage ("gradual"), or in rounds that
    rewind the weights ("iterative"). ``pattern``: where kept weights may lie: "unstructured", "channels", or "N:M".
    ``floor``: what each layer keeps at least, a number of weights or a fraction of them (null: one).
    ``objective``: changes to the objective of the prune and finetune stages for this network alone, laid over the
    stage's own; another ``name`` replaces it. So one recipe can learn scores against several objectives.
    """

    dense: bool = False
    criterion: str = "score"
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.95
    budget: str = "erk"
    floor: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    schedule: str = "one_shot"
    pattern: str = "unstructured"
    objective: dict[str, Any] | None = None
    name: FolderName = Field(default_factory=default_name)

    @field_validator("criterion", "budget", "schedule")
    @classmethod
    def _known(cls, value: str, info) -> str:
        from certprune.pruning import BUDGETS, CRITERIA, SCHEDULES
        from certprune.registry import look_up

        known = {"criterion": CRITERIA, "budget": BUDGETS, "schedule": SCHEDULES}
        look_up(info.field_name, value, known[info.field_name])
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_known(cls, value: str) -> str:
        from certprune.pruning import pattern_of

        pattern_of(value)
        return value

    @model_validator(mode="after")
    def _dense_is_dense(self):
        given = self.model_fields_set & {"criterion", "sparsity", "budget", "floor", "schedule", "pattern"}
        if self.dense and given:
            raise ValueError(f"a dense variant is not pruned: leave out {', '.join(sorted(given))}")
        return self

    @model_validator(mode="after")
    def _combination_means_something(self):
        rank = self.pruning().rank
        if self.schedule == "iterative" and rank.trained and not rank.with_weights:
            raise ValueError(
                f"the schedule iterative rewinds weights, but the criterion {self.criterion} does not train them: use "
                "gradual, or the criterion joint"
            )
        return self

    @property
    def trains(self) -> tuple[bool, bool]:
        """Whether the prune stage trains scores, and whether it trains weights."""
        from certprune.pruning import CRITERIA, SCHEDULES

        rank = CRITERIA[self.criterion]
        moving = SCHEDULES[self.schedule].trains_weights and not rank.trained
        return rank.trained and not self.dense, (rank.with_weights or moving) and not self.dense

    def pruning(self, seed: int = 0):
        """What is to be pruned, for `certprune.masks` and :class:`~certprune.masker.Masker`."""
        from certprune.pruning import Pruning

        return Pruning(self.sparsity, self.criterion, self.budget, self.floor, self.pattern, seed)


class Recipe(Settings):
    """A whole experiment: data, network, objective, the three stages, the variants, and what is certified.

    ``sync_batch_norm``: of several processes, whether BatchNorm in training takes the statistics of the whole batch,
    as a single process does (else each its part's own).
    """

    name: FolderName
    seed: Whole = 0
    output: str = Field(default_factory=lambda earlier: f"runs/{earlier['name']}", min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = None
    speed: SpeedSettings = SpeedSettings()
    sync_batch_norm: bool = False
    data: DataSettings
    model: Named
    objective: dict[str, Any]
    initialisation: Literal["ibp", "he", "default"] = "ibp"
    pretrain: PretrainSettings = PretrainSettings()
    prune: PruneSettings = PruneSettings()
    finetune: StageSettings = StageSettings()
    variants: Annotated[tuple[VariantSettings, ...], Field(strict=False)] = ()
    certify: Annotated[CertifySettings, Field(validate_default=True)] = CertifySettings()

    @field_validator("objective")
    @classmethod
    def _resolved(cls, value: dict[str, Any]) -> dict[str, Any]:
        from certprune.objectives import build_objective

        # With its defaults, so that a run folder says all, and goes on the same if a default ever changes.
        return build_objective(value).model_dump(mode="json")

    @field_validator("pretrain", "prune", "finetune")
    @classmethod
    def _stage_objective_builds(cls, value: StageSettings, info) -> StageSettings:
        if value.objective is None or "objective" not in info.data:
            return value
        return value.model_copy(update={"objective": _checked_over([info.data["objective"]], value.objective)})

    @field_validator("variants")
    @classmethod
    def _variant_objectives_build(cls, value: tuple[VariantSettings, ...], info) -> tuple[VariantSettings, ...]:
        stages = [info.data[stage] for stage in ("prune", "finetune") if stage in info.data]
        if "objective" not in info.data or len(stages) < 2:  # these have mistakes of their own
            return value
        below = [merged(info.data["objective"], stage.objective or {}) for stage in stages]
        checked, mistakes = [], []
        for variant in value:
            try:
                over = None if variant.objective is None else _checked_over(below, variant.objective)
                checked.append(variant.model_copy(update={"objective": over}))
            except ValueError as error:
                mistakes.append(f"{variant.name}: {error}")
        if mistakes:
            raise ValueError(" ".join(mistakes))
        return tuple(checked)

    @field_validator("certify")
    @classmethod
    def _smoothing_resolved(cls, value: CertifySettings, info) -> CertifySettings:
        if "objective" not in info.data:  # it has a mistake of its own
            return value
        smoothing, objective = value.smoothing, info.data["objective"]
        if smoothing is None and "smoothing" not in value.model_fields_set and trained_under_noise(objective):
            smoothing = SmoothingSettings()
        if smoothing is not None and smoothing.sigma is None:
            if "sigma" not in objective:
                raise ValueError(
                    f"smoothing.sigma must be given, since the objective {objective['name']} has no sigma of its own"
                )
            smoothing = smoothing.model_copy(update={"sigma": float(objective["sigma"])})
        return value.model_copy(update={"smoothing": smoothing})

    @field_validator("variants")
    @classmethod
    def _rounds_fit(cls, value: tuple[VariantSettings, ...], info) -> tuple[VariantSettings, ...]:
        prune = info.data.get("prune")
        if prune and 0 < prune.epochs < prune.rounds and any(each.schedule == "iterative" for each in value):
            raise ValueError(
                f"an iterative variant trains an epoch or more in each round, but prune.rounds is {prune.rounds} and "
                f"prune.epochs {prune.epochs}: raise the epochs or lower the rounds"
            )
        return value

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, value: tuple[VariantSettings, ...]) -> tuple[VariantSettings, ...]:
        names = [variant.name for variant in value]
        for name in names:
            if name in RESERVED:
                raise ValueError(f"a variant cannot be called {name!r}, the name of another folder of the run")
            if names.count(name) > 1:
                raise ValueError(f"two variants are called {name!r}; give one of them another name")
        return value

    @property
    def eps_grid(self) -> tuple[float, ...]:
        """Every eps to certify at: as the recipe lists them, else the objective's own."""
        if self.certify.eps is not None:
            return self.certify.eps
        return (float(self.objective["eps"]),) if "eps" in self.objective else ()

    @property
    def main_eps(self) -> float | None:
        """The eps that tables show: the objective's if it is certified, else the largest one certified."""
        trained = self.objective.get("eps")
        return trained if trained in self.eps_grid else max(self.eps_grid, default=None)

    @property
    def norm(self) -> str:
        """The norm of the threat set that is trained against and certified: "linf" or "l2"."""
        return self.objective.get("norm", "linf")

    def stage_objective(self, stage: str, variant: VariantSettings | None = None) -> dict[str, Any]:
        """The objective of a stage: the recipe's, with the stage's own changes over it, then the variant's.

        Pretraining belongs to no variant.
        """
        shared = merged(self.objective, getattr(self, stage).objective or {})
        return merged(shared, (variant.objective if variant else None) or {})

    def variant(self, name: str) -> VariantSettings | None:
        return next((variant for variant in self.variants if variant.name == name), None)


def trained_under_noise(objective: dict[str, Any]) -> bool:
    """Whether an objective is for randomized smoothing: it has a sigma, and no eps to prove anything at."""
    return "sigma" in objective and "eps" not in objective


def _checked_over(below: list[dict[str, Any]], over: dict[str, Any]) -> dict[str, Any]:
    """``over``, once it makes an objective over each of ``below``; with its defaults where it replaces them all."""
    from certprune.objectives import build_objective

    built = [build_objective(merged(base, over)) for base in below]
    if over.get("name", below[0]["name"]) in [base["name"] for base in below]:
        return over
    return built[0].model_dump(mode="json")  # a run folder then says all, as with the recipe's own objective


def merged(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``: mappings merge key by key, anything else is replaced.

    A mapping with another ``name`` replaces the whole, since the options of one thing mean nothing to
    another.
    """
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "name" in over and "name" in base and over["name"] != base["name"]:
        return dict(over)
    return merged_keys(base, over)


def merged_keys(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """:func:`merged` for two mappings that describe the same thing, whatever their names."""
    return {
        **base,
        **{key: merged(base[key], value) if key in base else value for key, value in over.items()},
    }
