"""Randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): l2 certificates for any classifier, by sampling.

The pieces are separate, so that another noise, another confidence bound or another radius replaces one of them alone:
:mod:`noise` draws, :mod:`sampling` turns draws into class counts, :mod:`bounds` turns counts into a probability that
holds with confidence and a probability into a radius; :mod:`classifier` puts them together, :mod:`verdict` keeps what
came out and :mod:`certification` fills a ledger.
"""

import importlib

_EXPORTS = {
    "bounds": ("certified_radius", "lower_confidence_bound", "radius_text"),
    "certification": ("certify_smoothed",),
    "classifier": ("Certificate", "SmoothedClassifier"),
    "verdict": ("KIND", "SmoothedLedger", "SmoothedVerdict", "certified_accuracy", "read_smoothed_ledger"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'certifiers.smoothing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"certifiers.smoothing.{_HOME[name]}"), name)
    globals()[name] = value
    return value
