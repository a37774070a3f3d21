"""The methods by name. To add one, write its function and add a line to :data:`METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.threat import Threat


class Answer(NamedTuple):
    """What a method found out.

    ``bounds`` (batch, classes): lower bounds of logit[y] - logit[j] over the threat set; an entry that is not finite
    proves nothing, and no entry is looked at whose class was not asked about. ``inputs`` (batch, ...): inputs that
    may be counterexamples, NaN where there is none (None: none at all). They are run through the network before
    they count, so one that is wrong does no harm.
    """

    bounds: Tensor
    inputs: Tensor | None = None


# (model, x, y, threat, classes, deadline) -> an Answer, or its bounds alone. The model is in eval mode with plain
# weights, the inputs are valid. ``classes`` (batch, classes) bool: which margins are asked for, never column y.
# ``deadline``: the moment of time.monotonic() at which to stop and answer with what is known, or None.
Certifier = Callable[[nn.Module, Tensor, Tensor, Threat, Tensor, "float | None"], "Answer | Tensor"]


def _bounds(method: str) -> Certifier:
    def lower_bounds(model, x, y, threat, classes, deadline=None) -> Tensor:
        from certifiers.bounds import check_against_model, margin_lower_bounds, trace

        with torch.no_grad():
            check_against_model(trace(model, tuple(x.shape[1:])), model, x)
            return margin_lower_bounds(model, x, y, threat, method=method, classes=classes)

    return lower_bounds


def _alpha(model, x, y, threat, classes, deadline=None) -> Tensor:
    from certifiers.bounds import Region, check_against_model, propagate, trace
    from certifiers.bounds.alpha import Ascent, alpha_margins
    from certifiers.bounds.linear import crown_intervals

    ascent = Ascent(deadline=deadline)
    with torch.no_grad():
        graph = trace(model, tuple(x.shape[1:]))
        check_against_model(graph, model, x)
        network = graph.bind()
        intervals = crown_intervals(network, propagate(network, Region.of(x, threat)), ascent.memory_mb, True)
        return alpha_margins(network, intervals, y, classes, ascent)


def _lirpa(method: str) -> Certifier:
    def lower_bounds(model, x, y, threat, classes, deadline=None) -> Tensor:
        try:
            from certifiers.lirpa import margin_lower_bounds_lirpa
        except ImportError as error:
            raise InputError(
                "The methods lirpa-crown and lirpa-alpha-crown need auto_LiRPA, which cannot be imported here "
                f"({error}). Install it, or choose among {', '.join(CASCADE)}."
            ) from error
        return margin_lower_bounds_lirpa(model, x, y, threat, method=method).detach()

    return lower_bounds


def _autoattack(model, x, y, threat, classes, deadline=None) -> Answer:
    from certifiers.autoattack import autoattack

    return Answer(x.new_full(classes.shape, -torch.inf), autoattack(model, x, y, threat))


METHODS: dict[str, Certifier] = {
    "ibp": _bounds("ibp"),
    "crown-ibp": _bounds("crown-ibp"),
    "crown": _bounds("crown"),
    "alpha-crown": _alpha,
    "symbolic": _bounds("symbolic"),
    "lirpa-crown": _lirpa("crown"),
    "lirpa-alpha-crown": _lirpa("alpha-crown"),
    "autoattack": _autoattack,
}

#: How many inputs these are asked about at a time, for the memory they take or so that each has its own deadline.
#: They are dear: what an attack has falsified already is not put to them.
AT_ONCE: dict[str, int] = {"alpha-crown": 32, "lirpa-alpha-crown": 8, "autoattack": 100}

CASCADE = ("ibp", "crown-ibp", "crown", "alpha-crown")  # cheapest first


def method_names(method: str | Sequence[str]) -> tuple[str, ...]:
    """The names that `method` stands for: "cascade", one name, or several; InputError for an unknown one."""
    given = (method,) if isinstance(method, str) else tuple(method)
    names = tuple(dict.fromkeys(name for one in given for name in (CASCADE if one == "cascade" else (one,))))
    for name in names:
        if name not in METHODS:
            raise InputError(f"The method to certify with must be cascade or among {', '.join(METHODS)}, not {name!r}.")
    if not names:
        raise InputError(f"At least one method to certify with is needed, among {', '.join(METHODS)}.")
    return names
