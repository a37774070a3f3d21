"""Train networks whose robustness can be proven, and prune them against the guarantee they must keep.

Names are loaded when first used, so that importing the package costs nothing.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "runs": ("load",),
    "masks": ("apply_masks", "freeze_masks", "materialize", "sparsify", "sparsity"),
    "data": ("load_data",),
    "models": ("build_model",),
    "objectives": ("build_objective",),
    "exchange": ("from_torch_prune", "load_hydra", "to_torch_prune"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'certprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"certprune.{_HOME[name]}"), name)
    globals()[name] = value
    return value
