"""Differentiable bound propagation over a traced graph.

``margin_lower_bounds`` and ``fused_cross_entropy`` take a model; objectives that need several bounds of one step
call the pieces: ``trace(model, shape).bind(x)`` -> ``propagate`` -> ``interval_margins`` / ``linear_margins`` /
``fused_loss``, which share the effective weights and the boxes.
"""

from .graph import Graph, Network, check_against_model, trace
from .interval import Intervals, propagate
from .margins import (
    METHODS,
    fused_cross_entropy,
    fused_loss,
    interval_margins,
    linear_margins,
    margin_lower_bounds,
    needs_clean_batch,
    symbolic_margins,
    worst_case_cross_entropy,
)
from .region import Region

__all__ = [
    "METHODS",
    "Graph",
    "Intervals",
    "Network",
    "Region",
    "check_against_model",
    "fused_cross_entropy",
    "fused_loss",
    "interval_margins",
    "linear_margins",
    "margin_lower_bounds",
    "needs_clean_batch",
    "propagate",
    "symbolic_margins",
    "trace",
    "worst_case_cross_entropy",
]
