"""Randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): certificates for any classifier, by sampling.

The pieces are separate, so that another noise, another confidence bound or another radius replaces one of them alone:
:mod:`noise` draws, :mod:`sampling` turns draws into class counts (:mod:`shared` where inputs share them),
:mod:`bounds` turns a fixed number of counts into a probability that holds with confidence, :mod:`anytime` counts at
any time, :mod:`kinds` a probability into a radius, :mod:`stopping` says when they are enough; :mod:`classifier` puts
them together, :mod:`verdict` keeps what came out and :mod:`certification` fills a ledger.
"""

import importlib

_EXPORTS = {
    "anytime": ("lower_sequence", "upper_sequence"),
    "bounds": ("certified_radius", "lower_confidence_bound", "radius_text"),
    "certification": ("certify_smoothed", "smoothing_header"),
    "classifier": ("Certificate", "SmoothedClassifier"),
    "kinds": ("implied_radius",),
    "stopping": ("Stopping",),
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
