"""Which layers are pruned: every convolution and linear layer, or those whose names match."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from certifiers.errors import InputError

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer whose weight can be pruned, by name, in the model's order; a shared layer stands once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}


def select_layers(
    model: nn.Module, layers: Sequence[str] | str | None = None, exclude: Sequence[str] | str = ()
) -> dict[str, nn.Module]:
    """The prunable layers whose names match a pattern of `layers` (None: all) and none of `exclude`.

    Patterns are shell-style and case-sensitive: "fc*", "layer1.*". The last layer is pruned like any other.
    Raises InputError if a pattern matches no layer, or if no layer is left.
    """
    found = prunable_layers(model)
    if not found:
        raise InputError("This model has no convolution or linear layer, so there is nothing to prune.")
    included = set(found) if layers is None else _matching("layers", layers, found)
    excluded = _matching("exclude", exclude, found)
    chosen = {name: module for name, module in found.items() if name in included and name not in excluded}
    if not chosen:
        raise InputError(
            f"layers={layers!r} without exclude={exclude!r} leaves no layer to prune. The layers are: {_listed(found)}."
        )
    return chosen


def _matching(option: str, patterns: Sequence[str] | str, found: dict[str, nn.Module]) -> set[str]:
    """Names that match any of the patterns; every pattern must match one."""
    names: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = {name for name in found if fnmatchcase(name, pattern)}
        if not matches:
            raise InputError(
                f"{option}: the pattern {pattern!r} matches no layer that can be pruned. These can: {_listed(found)}."
            )
        names |= matches
    return names


def _listed(found: dict[str, nn.Module]) -> str:
    return ", ".join(repr(name) for name in found)
