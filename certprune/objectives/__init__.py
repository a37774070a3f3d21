"""Objectives by name. To add one: a file with a settings class, one line here, one row in the tests."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from certifiers.errors import InputError

from .adversarial import Adversarial
from .base import Objective, Ramp, RobustObjective, Weight
from .benign import Benign
from .certified import IBP, CrownIBP
from .expressive import CCIBP, MTLIBP
from .free import Free
from .mixtrain import MixTrain
from .sabr import SABR
from .smoothadv import SmoothAdv
from .smoothing import Consistency, Gaussian, Stability
from .trades import Trades

OBJECTIVES: dict[str, type[Objective]] = {
    "benign": Benign,
    "ibp": IBP,
    "crown_ibp": CrownIBP,
    "mixtrain": MixTrain,
    "sabr": SABR,
    "mtl_ibp": MTLIBP,
    "cc_ibp": CCIBP,
    "adversarial": Adversarial,
    "trades": Trades,
    "free": Free,
    "gaussian": Gaussian,
    "stability": Stability,
    "consistency": Consistency,
    "smoothadv": SmoothAdv,
}

__all__ = ["OBJECTIVES", "Objective", "Ramp", "RobustObjective", "Weight", "build_objective", "needs_bounds"]


def build_objective(settings: dict[str, Any]) -> Objective:
    """The objective that a recipe describes: ``{"name": "crown_ibp", "eps": 0.1, ...}``.

    Raises:
        InputError: an unknown name or key, a wrong type or an impossible value; all mistakes in one message.
    """
    from certprune.registry import look_up

    if not isinstance(settings, dict) or "name" not in settings:
        raise InputError(f"An objective needs a name (one of {', '.join(OBJECTIVES)}), but is {settings!r}.")
    kind = look_up("objective", settings["name"], OBJECTIVES)
    try:
        return kind(**settings)
    except ValidationError as error:
        mistakes = "; ".join(_mistake(e, kind) for e in error.errors())
        raise InputError(f"objective '{settings['name']}': {mistakes}.") from error


def needs_bounds(objective: Objective) -> bool:
    """Whether the loss is made of bounds, so that every layer of the network must be one whose bounds are known."""
    return isinstance(objective, (IBP, MixTrain))


def _mistake(error: dict[str, Any], kind: type[Objective]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, kind.model_fields, n=1)
        maybe = f" (did you mean '{near[0]}'?)" if near else ""
        return f"unknown key '{where}'{maybe}, expected one of {', '.join(kind.model_fields)}"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}' is {error['input']!r}: {error['msg'].removeprefix('Value error, ').lower()}"
