"""Backward linear bounds (CROWN; Zhang et al. 2018, arXiv 1811.00866) over a traced network.

A linear lower bound of some node is carried back to the input, layer by layer: exactly through affine layers,
by CROWN's two lines through ReLUs whose input boxes are known. Rows have the shape ``(samples, rows, *shape)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from .graph import Network, nonlinear_places
from .interval import Intervals
from .nonlinear import NONLINEAR, ReLU
from .operations import Interval
from .rounding import Tally

#: Tensors of a row's largest size alive at once while it is carried back; measured on convolutional nets.
_LIVE_COPIES = 8


def lower_bounds(
    network: Network,
    place: int,
    rows: Tensor,
    intervals: Intervals,
    samples: Tensor | None = None,
    slopes: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Lower bounds of ``rows . value of node place`` over the region of ``intervals``.

    Args:
        place: which node the rows are about.
        rows: coefficients, ``(batch, rows, *shape)``; with ``samples``, ``(len(samples), rows, *shape)``.
        intervals: boxes of all nodes, for the whole batch.
        samples: which sample of the batch each first index of ``rows`` belongs to; None: in order.
        slopes: by the place of a ReLU, the slopes of the lines below its unstable units (see ``ReLU.backward``);
            CROWN's own choice where there are none.

    Returns:
        ``(batch or len(samples), rows)``.
    """
    row, constant, tally = _carried(network, place, rows, intervals, samples, slopes)
    bound = constant
    if row is not None:  # else nothing depends on the input
        region = intervals.region if samples is None else intervals.region.select(samples)
        bound = region.minimum(row) + constant
        if tally is not None:
            tally.carried(0, row)
    return bound if tally is None else tally.below(bound)


def least_inputs(
    network: Network, place: int, rows: Tensor, intervals: Intervals, samples: Tensor | None = None
) -> Tensor:
    """Where in the region the bounds of :func:`lower_bounds` are least, ``(samples, rows, *input shape)``.

    Nothing is claimed of these inputs; but where a bound is tight, its row is nearly as small there.
    """
    row, _, _ = _carried(network, place, rows, intervals, samples)
    region = intervals.region if samples is None else intervals.region.select(samples)
    row = region.box.centre.new_zeros(*rows.shape[:2], *network.nodes[0].shape) if row is None else row
    return region.minimiser(row)


def _carried(network, place, rows, intervals, samples=None, slopes=None) -> tuple[Tensor | None, Tensor, Tally | None]:
    """The rows carried back to the input (None: nothing arrives), their constant, and the account of rounding."""
    pending: dict[int, Tensor] = {place: rows}
    constant = rows.new_zeros(rows.shape[:2])
    tally = intervals.tally(network, samples)
    for i in range(place, 0, -1):
        if i not in pending:
            continue
        operation, inputs = network.operations[i], network.nodes[i].inputs
        box = _of(intervals.boxes[inputs[0]], samples) if isinstance(operation, NONLINEAR) else None
        row, chosen = pending.pop(i), None if slopes is None else slopes.get(i)
        if tally is not None:
            tally.carried(i, row)
        parts, added = operation.backward(row, box) if chosen is None else operation.backward(row, box, chosen)
        constant = constant + added
        if tally is not None:
            tally.passed(i, inputs, added, pending)
        for j, part in zip(inputs, parts, strict=True):
            pending[j] = pending[j] + part if j in pending else part
    return pending.get(0), constant, tally


def elided_bounds(network: Network, rows: Tensor, intervals: Intervals) -> Interval:
    """Boxes of ``rows . output`` from interval bounds, the affine layers at the end merged into the rows.

    Merging is what makes the interval bound of a margin tight: the difference of two logits is one linear
    function of the last activations, not two.
    """
    pending: dict[int, Tensor] = {len(network.nodes) - 1: rows}
    centre: Tensor | float = 0.0
    radius: Tensor | float = 0.0
    tally = intervals.tally(network)
    for i in range(len(network.nodes) - 1, -1, -1):
        if i not in pending:
            continue
        row = pending.pop(i)
        ends_here = i == 0 or isinstance(network.operations[i], NONLINEAR)
        if tally is not None:
            tally.carried(i, row, ends_here)
        if i == 0:
            box = Interval.between(intervals.region.minimum(row), -intervals.region.minimum(-row))
            centre, radius = centre + box.centre, radius + box.radius
        elif ends_here:
            flat, box = row.flatten(2), intervals.boxes[i]
            centre = centre + (flat @ box.centre.flatten(1).unsqueeze(2)).squeeze(2)
            radius = radius + (flat.abs() @ box.radius.flatten(1).unsqueeze(2)).squeeze(2)
        else:
            inputs = network.nodes[i].inputs
            parts, added = network.operations[i].backward(row)
            centre = centre + added
            if tally is not None:
                tally.passed(i, inputs, added, pending)
            for j, part in zip(inputs, parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
    return Interval(centre, radius if tally is None else radius + tally.loss(centre.abs() + radius))


def crown_intervals(network: Network, intervals: Intervals, memory_mb: float, meet: bool = False) -> Intervals:
    """Boxes of all nodes with backward bounds in front of every nonlinear layer, in one sweep forward.

    Only units that interval arithmetic (from the boxes before) leaves unstable are bounded backward, for a stable
    unit's relaxation is exact whatever its box; only where intervals are not exact already; and as many rows at a
    time as ``memory_mb`` megabytes allow. With ``meet`` a unit keeps the better of the backward bound and interval
    arithmetic, which is sound too; networks that were trained on intervals are often bounded better by these.
    """
    in_front = {network.nodes[place].inputs[0]: network.operations[place] for place in nonlinear_places(network)}
    for place in range(1, len(network.nodes)):
        if intervals.exact[place]:
            continue
        intervals = intervals.refresh(network, place)
        box = intervals.boxes[place]
        if place not in in_front:
            continue
        # MaxPool has no stable units: its windows compare every box.
        relu = isinstance(in_front[place], ReLU)
        unstable = (box.lower < 0) & (box.upper > 0) if relu else torch.ones_like(box.lower, dtype=torch.bool)
        samples, units = unstable.flatten(1).nonzero(as_tuple=True)
        if len(samples) == 0:
            continue
        least, most = _unit_bounds(network, place, samples, units, intervals, memory_mb)
        was = box.lower.flatten(1)[samples, units], box.upper.flatten(1)[samples, units]
        if meet:
            least, most = torch.maximum(least, was[0]), torch.minimum(most, was[1])
        # Where rounding leaves no finite bound, the interval stays: a box has a centre and a radius.
        found = torch.where(least.isfinite(), least, was[0]), torch.where(most.isfinite(), most, was[1])
        lower, upper = (
            old.flatten(1).index_put((samples, units), values).reshape(old.shape)
            for old, values in zip((box.lower, box.upper), found, strict=True)
        )
        intervals = intervals.replace(place, intervals.between(lower, torch.maximum(lower, upper)))
    return intervals


def _unit_bounds(network, place, samples, units, intervals, memory_mb) -> tuple[Tensor, Tensor]:
    """Backward bounds of single units of a node, ``(len(samples),)`` each, in chunks."""
    shape = network.nodes[place].shape
    like = intervals.region.box.centre
    largest = max(prod(n.shape) for n in network.nodes[: place + 1])
    chunk = max(int(memory_mb * 2**20 / (2 * _LIVE_COPIES * largest * like.element_size())), 1)
    lowers, uppers = [], []
    for start in range(0, len(samples), chunk):
        which, unit = samples[start : start + chunk], units[start : start + chunk]
        one_hot = torch.zeros(len(which), prod(shape), dtype=like.dtype, device=like.device)
        one_hot = one_hot.scatter(1, unit.unsqueeze(1), 1.0).reshape(len(which), *shape)
        least = lower_bounds(network, place, torch.stack([one_hot, -one_hot], 1), intervals, which)
        lowers.append(least[:, 0])
        uppers.append(-least[:, 1])
    return torch.cat(lowers), torch.cat(uppers)


def _of(box: Interval, samples: Tensor | None) -> Interval:
    return box if samples is None else Interval(box.centre[samples], box.radius[samples])
