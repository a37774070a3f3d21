"""Code that runs in a model's forward pass although torch.fx does not see it: hooks, methods put on an instance."""

from __future__ import annotations

from torch import fx, nn

from ..errors import UnsupportedLayer

# What the forward passes of known layers call, and may be put in its place.
_METHODS = ("__call__", "forward", "_conv_forward", "_check_input_dim")


def keeps_methods(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` computes by the methods of ``kind``, a class that it inherits from."""
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _METHODS)


def check_overridden(model: nn.Module) -> None:
    """Raise UnsupportedLayer if something else than the forward passes of the model's classes runs.

    Parametrisations are aside: their results are looked up, whatever computes them.
    """
    for name, module in model.named_modules():
        if ".parametrizations" in f".{name}":
            continue
        where = f"its module '{name}' ({type(module).__name__})" if name else "it"
        found = None
        if module._forward_hooks or module._forward_pre_hooks:
            found = "has a forward hook, which may change values: remove it (its handle's remove())"
        own = [method for method in _METHODS if method in vars(module)]
        if own:
            found = f"has a method '{own[0]}' of its own, which its class does not know of: put it into a class"
        if not name and type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            found = "is of a class with a method '__call__' of its own: put what it does into 'forward'"
        if found is not None:
            raise UnsupportedLayer(f"Cannot bound {type(model).__name__}: {where} {found}.")
