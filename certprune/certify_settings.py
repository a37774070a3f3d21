"""The part of a recipe that says what is certified, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from certprune.settings import Positive, Rate, Settings, Whole


class SmoothingSettings(Settings):
    """Certification by randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): one pass gives every radius.

    ``sigma``: standard deviation of the noise, in pixels (null: the objective's). ``noise``: gaussian certifies l2
    radii, uniform l1 radii. ``n0`` noisy samples select an image's class, ``n`` estimate its probability; ``alpha``:
    how often a certificate may be wrong. ``count``: only the first so many images of the split. ``radii``: the radii,
    in pixels, that tables show. ``batch_size``: noisy samples in a forward pass (null: what is fastest); it does not
    change the noise.

    ``tolerance``: stop sampling an image when n samples would add no more than this to its radius, or the radius is
    ``up_to``; ``decide``: stop when each of these radii is certified or out of reach. Bounds are then such that hold
    at any time. ``shared_noise``: all images get the same noise, which is faster and makes their certificates depend
    on each other.
    """

    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    noise: Literal["gaussian", "uniform"] = "gaussian"
    n0: Positive = 100
    n: Positive = 10_000
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    count: Positive | None = 500
    radii: Annotated[tuple[Rate, ...], Field(strict=False, min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    batch_size: Positive | None = None
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    up_to: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    decide: Annotated[tuple[Rate, ...], Field(strict=False)] = ()
    shared_noise: bool = False

    @model_validator(mode="after")
    def _bounded_curve(self) -> SmoothingSettings:
        if self.up_to is not None and self.tolerance is None:
            raise ValueError("up_to says how far a curve goes whose tolerance is given; give a tolerance too")
        return self

    @property
    def stopping(self) -> Any:
        """The rule that ends sampling early (:class:`certifiers.smoothing.Stopping`); None for a fixed n."""
        if self.tolerance is None and not self.decide:
            return None
        from certifiers.smoothing import Stopping

        return Stopping(self.tolerance, self.up_to, self.decide)

    @field_validator("radii")
    @classmethod
    def _once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same radius stands there twice; give each once")
        return tuple(sorted(value))


class CertifySettings(Settings):
    """Which inputs are certified, at which eps (null: the objective's), by which methods, cheapest first.

    ``cascade`` among the methods stands for all from the cheapest to optimised slopes.

    ``count``: only the first so many images of the split. Every image is attacked before it is proven.
    ``smoothing``: certify by randomized smoothing too. A recipe whose objective trains under noise (it has a sigma
    and no eps) does so by itself, unless it says ``smoothing: null``.
    """

    methods: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("ibp", "crown-ibp", "crown")
    eps: Annotated[tuple[Rate, ...], Field(strict=False, min_length=1)] | None = None
    split: Literal["train", "validation", "test"] = "test"
    count: Positive | None = None
    attack_steps: Whole = 40
    attack_restarts: Positive = 1
    batch_size: Positive = 200
    smoothing: SmoothingSettings | None = None

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from certifiers.certification import CASCADE, METHODS
        from certprune.registry import look_up

        for method in value:
            look_up("method", method, dict.fromkeys([*METHODS, "cascade"]))
        return tuple(dict.fromkeys(name for one in value for name in (CASCADE if one == "cascade" else (one,))))

    @field_validator("eps")
    @classmethod
    def _once(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("the same eps stands there twice; give each once")
        return value
