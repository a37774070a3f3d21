"""The seam to complete searches: what bounds leave open is handed to one of these.

Another search is another function of the type :data:`Decide`, given to :func:`certifiers.vnncomp.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..bounds.graph import trace
from ..bounds.operations import Interval
from ..bounds.region import Region
from ..errors import UnsupportedLayer
from .bounding import Rows
from .query import Polytope
from .splitting import MOST_INPUTS, split_inputs

#: (model in float64 with flat inputs, lower (inputs,), upper, polytopes, deadline on ``time.monotonic``) ->
#: ("unsat", None), ("sat", an input (inputs,)), ("unknown", None) or ("timeout", None). "unsat" must be a proof that
#: no input of the box has its output in a polytope; an input is run through the file before it counts.
Decide = Callable[[nn.Module, Tensor, Tensor, Sequence[Polytope], float], tuple[str, Tensor | None]]


def complete(
    model: nn.Module, lower: Tensor, upper: Tensor, polytopes: Sequence[Polytope], deadline: float
) -> tuple[str, Tensor | None]:
    """The default: halve the box where few inputs move, else split ReLUs."""
    if int((upper > lower).sum()) <= MOST_INPUTS:
        return split_inputs(model, lower, upper, polytopes, deadline)
    return split_relus(model, lower, upper, polytopes, deadline)


def split_relus(
    model: nn.Module, lower: Tensor, upper: Tensor, polytopes: Sequence[Polytope], deadline: float
) -> tuple[str, Tensor | None]:
    """Branch and bound over ReLUs (certifiers.exact), for polytopes of one row each."""
    from ..exact import decide_rows

    rows = Rows(polytopes)
    if len(rows.b) > rows.count:
        return "unknown", None
    network = trace(model, tuple(lower.shape)).bind()
    region = Region(Interval.between(lower.unsqueeze(0), upper.unsqueeze(0)))

    def breaks(point: Tensor) -> bool:
        with torch.no_grad():
            y = model(point.double().reshape(1, -1))[0]
        return any(bool(polytope.excess(y) <= 0) for polytope in polytopes)

    with torch.no_grad():
        offset = -rows.b - rows.slack(network, region.box.centre)[0]
    try:
        outcome = decide_rows(network, region, rows.a, offset, deadline, breaks)
    except UnsupportedLayer:  # max pooling
        return "unknown", None
    if outcome.proven is None:
        return "timeout", None
    return ("unsat", None) if outcome.proven else ("sat", outcome.witness.double().flatten())
