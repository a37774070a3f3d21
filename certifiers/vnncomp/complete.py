"""The seam to complete searches: what bounds leave open is handed to one of these.

Another search is another function of the type :data:`Decide`, given to :func:`certifiers.vnncomp.verify`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnsupportedLayer
from .bounding import Rows
from .left import Left
from .splitting import MOST_INPUTS, split_inputs

#: What is left of one box -> ("unsat", None), ("sat", an input (inputs,)), ("unknown", None) or ("timeout", None).
#: "unsat" must be a proof that no input of the box has its output in a polytope; an input is run through the file
#: before it counts.
Decide = Callable[[Left], tuple[str, Tensor | None]]


def complete(left: Left) -> tuple[str, Tensor | None]:
    """The default: halve the box where few inputs move, else split ReLUs."""
    if int((left.upper > left.lower).sum()) <= MOST_INPUTS:
        return split_inputs(left)
    return split_relus(left)


def split_relus(left: Left) -> tuple[str, Tensor | None]:
    """Branch and bound over ReLUs (certifiers.exact).

    A polytope is out of a subdomain's reach where one of its rows, or a combination of them, is above its b there.
    """
    from ..exact import decide_rows

    rows = Rows(left.polytopes)

    def breaks(point: Tensor) -> bool:
        with torch.no_grad():
            y = left.model(point.double().reshape(1, -1))[0]
        return any(bool(polytope.excess(y) <= 0) for polytope in left.polytopes)

    offset = -rows.b - rows.slack(left.intervals)[0]
    try:
        outcome = decide_rows(
            left.network, left.intervals.region, rows.a, offset, left.deadline, breaks, left.intervals, rows.owner
        )
    except UnsupportedLayer:  # max pooling
        return "unknown", None
    if outcome.proven is None:
        return "timeout", None
    return ("unsat", None) if outcome.proven else ("sat", outcome.witness.double().flatten())
