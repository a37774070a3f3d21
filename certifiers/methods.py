"""The methods by name. To add one, write its function and add a line to :data:`METHODS`."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from certifiers.attack import attack
from certifiers.bounds import rounding
from certifiers.errors import InputError, UnsupportedLayer
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
    """Bounds that hold in exact arithmetic: where single precision cannot tell them from 0, double precision does.

    Where a linear bound does not prove a margin, the input where it is least is often a counterexample, and offered.
    """

    @torch.no_grad()
    def certifier(model, x, y, threat, classes, deadline=None) -> Answer:
        from certifiers.bounds import check_against_model, margin_lower_bounds, trace
        from certifiers.bounds.margins import bounded, margins_of

        given = x.dtype
        model, x = _trusted(model, x)
        check_against_model(trace(model, tuple(x.shape[1:])), model, x)
        network, intervals = bounded(model, x, threat, method, account_for_rounding=True)
        bounds = margins_of(method, network, intervals, y, classes=classes)
        size = model(x).abs().amax(1, keepdim=True)
        close = (classes & (bounds <= 0) & (bounds > -CLOSE * (1 + size))).any(1).nonzero().flatten()
        if len(close) and x.dtype != torch.float64:
            found = margin_lower_bounds(
                copy.deepcopy(model).double(),
                x[close].double(),
                y[close],
                threat.select(close),
                method,
                classes=classes[close],
                account_for_rounding=True,
            )
            bounds[close] = torch.maximum(bounds[close], rounded_down(found, x.dtype))
        proven = rounded_down(bounds, given)
        if method == "ibp":
            return Answer(proven)
        return Answer(proven, _suspects(model, network, intervals, x, y, threat, classes & ~(bounds > 0)))

    return certifier


def _trusted(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Both in double precision, where single precision is not what the account of rounding takes it for."""
    if x.dtype == torch.float64 or rounding.single_is_single(x.device):
        return model, x
    return copy.deepcopy(model).double(), x.double()


def _suspects(model, network, intervals, x: Tensor, y: Tensor, threat: Threat, open_: Tensor) -> Tensor | None:
    """For each input with an open margin, of the inputs where these margins' linear bounds are least the worst.

    A few steps of the attack from there follow, where it is not a counterexample yet.
    """
    from certifiers.bounds.margins import least_margin_inputs

    if not open_.any():
        return None
    points, samples, _ = least_margin_inputs(network, intervals, y, open_)
    points = threat.select(samples).project(x[samples], points)
    logits = model(points)
    label = logits.gather(1, y[samples, None])
    excess = (logits.scatter(1, y[samples, None], -torch.inf) - label).amax(1)
    worst = excess.new_full((len(x),), -torch.inf).scatter_reduce(0, samples, excess, "amax")
    chosen = excess >= worst[samples]
    inputs = torch.full_like(x, torch.nan).index_copy(0, samples[chosen], points[chosen])
    asked = open_.any(1).nonzero().flatten()
    inputs[asked] = attack(model, x[asked], y[asked], threat.select(asked), SUSPECT_STEPS, 1, start=inputs[asked])[0]
    return inputs


def rounded_down(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Bounds of a wider type as such of a narrower one that still hold; others, and not finite ones, as they are."""
    if bounds.dtype == dtype:
        return bounds
    nearest = bounds.to(dtype)
    return torch.where(bounds.isfinite(), torch.nextafter(nearest, nearest.new_tensor(-torch.inf)), nearest)


def _symbolic(model, x, y, threat, classes, deadline=None) -> Tensor:
    """The one method that does not account for rounding: it is training's, and nothing in the cascade rests on it."""
    from certifiers.bounds import check_against_model, margin_lower_bounds, trace

    with torch.no_grad():
        check_against_model(trace(model, tuple(x.shape[1:])), model, x)
        return margin_lower_bounds(model, x, y, threat, "symbolic", classes=classes)


def _alpha(model, x, y, threat, classes, deadline=None) -> Tensor:
    from certifiers.bounds import Region, check_against_model, propagate, trace
    from certifiers.bounds.alpha import Ascent, alpha_margins
    from certifiers.bounds.linear import crown_intervals

    ascent = Ascent(deadline=deadline)
    given = x.dtype
    model, x = _trusted(model, x)
    with torch.no_grad():
        graph = trace(model, tuple(x.shape[1:]))
        check_against_model(graph, model, x)
        network = graph.bind()
        intervals = propagate(network, Region.of(x, threat, True), account_for_rounding=True)
        intervals = crown_intervals(network, intervals, ascent.memory_mb, meet=True)
        return rounded_down(alpha_margins(network, intervals, y, classes, ascent), given)


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


def _attack(model, x, y, threat, classes, deadline=None) -> Tensor:
    """Nothing beyond the attack that every verdict begins with: for networks too large for any proof."""
    return x.new_full(classes.shape, -torch.inf)


def _autoattack(model, x, y, threat, classes, deadline=None) -> Answer:
    from certifiers.autoattack import autoattack

    return Answer(x.new_full(classes.shape, -torch.inf), autoattack(model, x, y, threat))


def _exact(model, x, y, threat, classes, deadline=None) -> Answer:
    """Branch and bound, one input after the other; each has an equal share of the time that is left."""
    from certifiers.exact import decide

    bounds, inputs = x.new_full(classes.shape, -torch.inf), torch.full_like(x, torch.nan)
    for row in range(len(x)):
        seconds = EXACT_SECONDS if deadline is None else max(deadline - time.monotonic(), 0.0) / (len(x) - row)
        asked = classes[row].nonzero().flatten()
        try:
            found = decide(model, x[row], int(y[row]), threat, seconds, asked.tolist())
        except UnsupportedLayer as error:  # max pooling: nothing is proven, and the other methods' work stands
            warnings.warn(f"The method exact leaves all undecided: {error}", stacklevel=2)
            break
        if found.proven is False:
            inputs[row] = found.witness.reshape(x.shape[1:]).to(x)
        else:  # the bound holds for each class that was asked about
            bound = torch.tensor(found.bound, dtype=torch.float64, device=x.device)
            bounds[row, asked] = rounded_down(bound, x.dtype)
    return Answer(bounds, inputs)


METHODS: dict[str, Certifier] = {
    "ibp": _bounds("ibp"),
    "crown-ibp": _bounds("crown-ibp"),
    "crown": _bounds("crown"),
    "alpha-crown": _alpha,
    "symbolic": _symbolic,
    "lirpa-crown": _lirpa("crown"),
    "lirpa-alpha-crown": _lirpa("alpha-crown"),
    "attack": _attack,
    "autoattack": _autoattack,
    "exact": _exact,
}

#: How many inputs these are asked about at a time, for the memory they take or so that each has its own deadline.
#: They are dear: what an attack has falsified already is not put to them.
AT_ONCE: dict[str, int] = {"alpha-crown": 32, "lirpa-alpha-crown": 8, "autoattack": 100, "exact": 1}

CASCADE = ("ibp", "crown-ibp", "crown", "alpha-crown")  # cheapest first
SUSPECT_STEPS = 10  # of the attack, from where a linear bound is least
CLOSE = 1e-3  # of the largest logit: a bound so little below 0 may owe it to rounding alone
EXACT_SECONDS = 60.0  # for each input, where no time limit is given


def method_names(method: str | Sequence[str], limited: bool = False) -> tuple[str, ...]:
    """The names that `method` stands for: "cascade", one name, or several; InputError for an unknown one.

    ``limited``: each input has a time limit. The cascade then ends with "exact", which needs one.
    """
    given = (method,) if isinstance(method, str) else tuple(method)
    cascade = (*CASCADE, "exact") if limited else CASCADE
    names = tuple(dict.fromkeys(name for one in given for name in (cascade if one == "cascade" else (one,))))
    for name in names:
        if name not in METHODS:
            raise InputError(f"The method to certify with must be cascade or among {', '.join(METHODS)}, not {name!r}.")
    if not names:
        raise InputError(f"At least one method to certify with is needed, among {', '.join(METHODS)}.")
    return names
