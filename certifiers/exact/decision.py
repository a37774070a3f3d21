"""The complete verifier's questions: is a prediction, or any linear property of the output, true of a whole region?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from certifiers.bounds.graph import Network, check_against_model, trace
from certifiers.bounds.interval import Intervals, propagate
from certifiers.bounds.linear import crown_intervals
from certifiers.bounds.margins import margin_rows
from certifiers.bounds.region import Region
from certifiers.checks import check_model
from certifiers.errors import InputError
from certifiers.threat import Threat, check_images

from .reduced import reduce
from .tree import Outcome, search

MEMORY_MB = 512


def decide(
    model: nn.Module, x: Tensor, y: int, threat: Threat, seconds: float, classes: Sequence[int] | None = None
) -> Outcome:
    """Whether the network predicts ``y`` for every input that ``threat`` allows around ``x`` (*shape), in [0, 1].

    Complete: given time it ends with a proof or with an input that breaks it. Only a margin within rounding of 0 is
    left open, and in l2 perhaps what holds in the ball but not in the box around it. Everything is computed in
    float64, for the network whose weights are ``model``'s. ``proven`` is True only if every margin against
    ``classes`` (default: all others) is positive on the whole region, in exact arithmetic: rounding, and the
    tolerances of linear programs, are accounted for. It is False only with a witness in the threat set on which the
    float64 network does not predict ``y`` (a tie is broken too).

    Args:
        model: (batch, *shape) -> logits, in eval mode with plain weights; not changed.
        seconds: when they are over the answer is None, with the bound reached so far.

    Raises:
        UnsupportedLayer: layers without bounds, or max pooling.
        InputError: inputs, model or classes that do not fit.
    """
    deadline = time.monotonic() + seconds
    check_model(model)
    check_images(x.unsqueeze(0))
    exact = copy.deepcopy(model).double().requires_grad_(False)
    image = x.detach().double().unsqueeze(0)
    graph = trace(exact, tuple(x.shape))
    check_against_model(graph, exact, image)
    network = graph.bind()
    rows, others = margin_rows(network, torch.tensor([y], device=x.device), image)
    if classes is not None:
        wanted = torch.tensor(sorted(set(classes)), device=x.device)
        if not torch.isin(wanted, others[0]).all():
            raise InputError(
                f"classes must be other classes than {y}, below {rows.shape[2]}, but {list(classes)} came."
            )
        rows = rows[:, torch.isin(others[0], wanted)]

    def broken(point: Tensor) -> bool:
        point = point.reshape(image.shape)
        with torch.no_grad():
            inside = bool(threat.contains(image, point, 1e-12))  # linear programs look at the box around a ball
            return inside and bool((rows[0] @ exact(point)[0] <= 0).any())

    region = Region.of(image, threat, account_for_rounding=True)
    return decide_rows(network, region, rows[0], torch.zeros(len(rows[0])).to(rows), deadline, broken)


@torch.no_grad()
def decide_rows(
    network: Network,
    region: Region,
    rows: Tensor,
    offset: Tensor,
    deadline: float,
    confirm: Callable[[Tensor], bool],
    intervals: Intervals | None = None,
    groups: Tensor | None = None,
) -> Outcome:
    """Whether ``rows . output + offset > 0``, each of them, everywhere in ``region``.

    With ``groups`` (rows,), 0, 1, 2, ...: whether everywhere in every group one of its rows is above 0.

    Args:
        network: bound, in float64. region: of one input (1, *shape), any box or ball.
        rows: (rows, outputs); offset: (rows,).
        deadline: of ``time.monotonic``.
        confirm: whether an input (pixels,) really breaks the property; only then is it a witness.
        intervals: boxes of all nodes over the region, in float64 and with rounding accounted for, where the caller
            has them; CROWN's else.
    """
    if intervals is None or intervals.reach is None:
        intervals = crown_intervals(network, propagate(network, region, account_for_rounding=True), MEMORY_MB)
    problem = reduce(network, intervals, rows, offset, groups)
    with torch.enable_grad():
        return search(problem, deadline, confirm)
