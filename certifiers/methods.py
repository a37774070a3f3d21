"""The certifiers by name. To add one, write its function and add a line to :data:`METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.threat import Threat

# (model, x, y, threat) -> (batch, classes), a lower bound of logit[y] - logit[j] over the threat set. The
# model is in eval mode with plain weights, the inputs are valid; an entry that is not finite proves nothing.
Certifier = Callable[[nn.Module, Tensor, Tensor, Threat], Tensor]


def _bounds(method: str) -> Certifier:
    def lower_bounds(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        from certifiers.bounds import check_against_model, margin_lower_bounds, trace

        with torch.no_grad():
            check_against_model(trace(model, tuple(x.shape[1:])), model, x)
            return margin_lower_bounds(model, x, y, threat, method=method)

    return lower_bounds


def _lirpa(method: str) -> Certifier:
    def lower_bounds(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        try:
            from certifiers.lirpa import margin_lower_bounds_lirpa
        except ImportError as error:
            raise InputError(
                "The methods lirpa-crown and alpha-crown need auto_LiRPA, which cannot be imported here "
                f"({error}). Install it, or choose among {', '.join(CASCADE)}."
            ) from error
        return margin_lower_bounds_lirpa(model, x, y, threat, method=method).detach()

    return lower_bounds


METHODS: dict[str, Certifier] = {
    "ibp": _bounds("ibp"),
    "crown-ibp": _bounds("crown-ibp"),
    "crown": _bounds("crown"),
    "symbolic": _bounds("symbolic"),
    "lirpa-crown": _lirpa("crown"),
    "alpha-crown": _lirpa("alpha-crown"),
}

CASCADE = ("ibp", "crown-ibp", "crown")  # cheapest first


def method_names(method: str | Sequence[str]) -> tuple[str, ...]:
    """The names that `method` stands for: "cascade", one name, or several; InputError for an unknown one."""
    names = CASCADE if method == "cascade" else (method,) if isinstance(method, str) else tuple(method)
    for name in names:
        if name not in METHODS:
            raise InputError(f"The method to certify with must be cascade or among {', '.join(METHODS)}, not {name!r}.")
    if not names:
        raise InputError(f"At least one method to certify with is needed, among {', '.join(METHODS)}.")
    return names
