"""Whose output channels can be pruned: layers whose outputs meet no sum and are not the network's."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

from certifiers.errors import InputError
from certprune.pruning.layers import PRUNABLE

_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_SUM_METHODS = {"add", "add_", "sub", "sub_"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, PRUNABLE) or super().is_leaf_module(module, qualified_name)


def check_channels(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise InputError for a layer of `chosen` whose channels meet a residual sum, or are the network's outputs.

    A channel of a sum is gone only if it is gone from every summand, and an output channel is a class.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # fx raises many kinds for control flow it cannot follow
        raise InputError(
            f"Channels are pruned in models that torch.fx can trace; {type(model).__name__} is not: {error}. Use "
            "another pattern, or rewrite that branch with plain tensor operations."
        ) from error
    modules = dict(model.named_modules())
    names = {id(layer): name for name, layer in chosen.items()}
    for node in graph.nodes:
        name = names.get(id(modules.get(node.target))) if node.op == "call_module" else None
        end = _end(node, modules) if name is not None else None
        if end is None:
            continue
        why = "are the network's classes" if end.op == "output" else f"are summed with others (in {end.name})"
        raise InputError(
            f"The pattern 'channels' cannot prune {name!r}: its output channels {why}. Exclude it "
            f"(prune.exclude: [{name}])."
        )


def _end(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The sum or the output that the channels of `node` reach before another layer mixes them, if any."""
    seen, waiting = {node}, list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "output" or _is_sum(user):
            return user
        if not isinstance(modules.get(user.target) if user.op == "call_module" else None, PRUNABLE):
            waiting += list(user.users)
    return None


def _is_sum(node: fx.Node) -> bool:
    """Whether two computed values are added; adding a constant keeps channels apart."""
    added = node.target in _SUMS if node.op == "call_function" else node.target in _SUM_METHODS
    computed = [parent for parent in node.all_input_nodes if parent.op != "get_attr"]
    return node.op in ("call_function", "call_method") and added and len(computed) > 1
