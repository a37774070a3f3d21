"""What can be proven about a network: bounds, verdicts, certificates.

Takes any plain ``nn.Module`` with inputs in [0, 1]; knows nothing of training, masks or data sets. Names are loaded
when first used, so that importing the package costs nothing.
"""

import importlib

_EXPORTS = {
    "bounds": ("fused_cross_entropy", "margin_lower_bounds", "trace"),
    "threat": ("L2Ball", "LinfBall"),
    "attack": ("pgd",),
    "certification": ("certify",),
    "verdict": ("Ledger", "Status", "Summary", "Verdict", "model_hash", "read_ledger", "summarise"),
    "errors": ("InputError", "SoundnessError", "UnsupportedLayer"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'certifiers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"certifiers.{_HOME[name]}"), name)
    globals()[name] = value
    return value
