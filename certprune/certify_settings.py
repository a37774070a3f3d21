"""The part of a recipe that says what is certified, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from certprune.settings import Positive, Rate, Settings, Whole


class SmoothingSettings(Settings):
    """Certification by randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): one pass gives every radius.

    ``sigma``: of the noise, in pixels (null: the objective's). ``n0`` noisy samples select an image's class, ``n``
    estimate its probability; ``alpha``: how often a certificate may be wrong. ``count``: only the first so many
    images of the split. ``radii``: the l2 radii, in pixels, that tables show. ``batch_size``: noisy samples in a
    forward pass (null: what suits the device); it does not change the noise.
    """

    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    n0: Positive = 100
    n: Positive = 10_000
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    count: Positive | None = 500
    radii: Annotated[tuple[Rate, ...], Field(strict=False, min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    batch_size: Positive | None = None

    @field_validator("radii")
    @classmethod
    def _once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same radius stands there twice; give each once")
        return tuple(sorted(value))


class CertifySettings(Settings):
    """Which inputs are certified, at which eps (null: the objective's), by which methods, cheapest first.

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
        from certifiers.certification import METHODS
        from certprune.registry import look_up

        for method in value:
            look_up("method", method, dict.fromkeys(METHODS))
        return value

    @field_validator("eps")
    @classmethod
    def _once(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("the same eps stands there twice; give each once")
        return value
