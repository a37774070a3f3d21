"""A verification question with everything that is decided already taken out.

Where an input may lie anywhere in its box, most ReLUs of a network are always active or always inactive, and what is
left is small: the *unstable* units. With the others fixed, the value before each unstable unit is linear in the
input and in the outputs of the unstable units below it,

    z = inputs . x + units . h + constant,    h = relu(z),

and so is whatever is asked about the output. These matrices are all that a search needs; the layers, however they
are connected, are not looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from certifiers.bounds import rounding
from certifiers.bounds.graph import Network, nonlinear_places
from certifiers.bounds.interval import Intervals
from certifiers.bounds.nonlinear import ReLU
from certifiers.bounds.operations import Interval
from certifiers.bounds.region import Region
from certifiers.errors import UnsupportedLayer


@dataclass(frozen=True)
class Rows:
    """Linear functions: ``inputs`` (rows, pixels), ``units`` (rows, units), ``constant`` (rows,).

    ``error`` (rows,): how far each may be, anywhere in the region, from what it stands for, because the coefficients
    were computed in floating point.
    """

    inputs: Tensor
    units: Tensor
    constant: Tensor
    error: Tensor

    def __getitem__(self, index) -> Rows:
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    def __neg__(self) -> Rows:
        return Rows(-self.inputs, -self.units, -self.constant, self.error)

    def __len__(self) -> int:
        return len(self.constant)

    def repeat(self, times: int) -> Rows:
        """All of them, that many times over."""
        return Rows(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in vars(self).values()))

    @staticmethod
    def cat(parts: list[Rows]) -> Rows:
        return Rows(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(Rows)))


@dataclass(frozen=True)
class Reduced:
    """One input's question about the unstable units alone.

    ``before``: the values before the units as :class:`Rows`; units are ordered so that each depends on those of
    earlier levels only. ``levels``: the units that one layer holds. ``asked``: the linear functions of the output
    whose sign is asked for. ``lower``, ``upper``: (units,), the box of each unit's z. ``region``: of the one input,
    flattened to (1, pixels).
    """

    before: Rows
    asked: Rows
    levels: tuple[slice, ...]
    lower: Tensor
    upper: Tensor
    region: Region

    @cached_property
    def pixel_size(self) -> Tensor:
        """The largest absolute value of each pixel, (pixels,)."""
        return rounding.size(self.region.box)[0]

    @cached_property
    def unit_size(self) -> Tensor:
        """The largest absolute value of each unit's z, (units,)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    @cached_property
    def unit_reach(self) -> Tensor:
        """The sum of the absolute values that each unit's z is made of, (units,)."""
        return self.reach(self.before)

    def reach(self, rows: Rows) -> Tensor:
        return rows.inputs.abs() @ self.pixel_size + rows.units.abs() @ self.unit_size + rows.constant.abs()

    def values(self, x: Tensor) -> Tensor:
        """What is asked, at inputs ``x`` (points, pixels) of the region: (points, questions)."""
        h = x.new_zeros(len(x), len(self.lower))
        for level in self.levels:
            z = self.before[level]
            h[:, level] = torch.relu(x @ z.inputs.T + h @ z.units.T + z.constant)
        return x @ self.asked.inputs.T + h @ self.asked.units.T + self.asked.constant


def reduce(network: Network, intervals: Intervals, rows: Tensor, offset: Tensor) -> Reduced:
    """The question about ``rows . output + offset``, rows (questions, outputs), for the one input of ``intervals``.

    Args:
        network: bound to its weights. Use float64: the matrices are what every later claim rests on.
        intervals: boxes of all nodes for a batch of one, as tight as can be had, rounding accounted for.

    Raises:
        UnsupportedLayer: a max pooling, which is not made of ReLUs here.
    """
    places = nonlinear_places(network)
    for place in places:
        if not isinstance(network.operations[place], ReLU):
            kind = type(network.operations[place]).__name__
            raise UnsupportedLayer(
                f"The complete search splits ReLUs, but '{network.nodes[place].name}' is a {kind} layer. "
                "Ask an incomplete method (crown, alpha-crown), or replace the pooling by a strided convolution."
            )
    boxes = {place: intervals.boxes[network.nodes[place].inputs[0]] for place in places}
    unstable = {p: ((b.lower < 0) & (b.upper > 0)).flatten().nonzero().squeeze(1) for p, b in boxes.items()}
    levels, start, columns = [], 0, {}
    for place in places:
        count = len(unstable[place])
        columns[place] = slice(start, start + count)
        if count:
            levels.append(columns[place])
        start += count
    carry = _Carrier(network, intervals, boxes, unstable, columns, start)
    before = []
    for place in places:
        before_place = network.nodes[place].inputs[0]
        shape = network.nodes[before_place].shape
        one_hot = torch.zeros(len(unstable[place]), prod(shape))
        one_hot = one_hot.to(rows).scatter(1, unstable[place].unsqueeze(1), 1.0)
        before.append(carry(before_place, one_hot.reshape(1, -1, *shape)))
    if not places:
        before, ends = [_nothing(rows, prod(network.nodes[0].shape))], [rows.new_zeros(0), rows.new_zeros(0)]
    else:
        ends = [torch.cat([getattr(boxes[p], e).flatten()[unstable[p]] for p in places]) for e in ("lower", "upper")]
    region = intervals.region
    flat = Region(
        Interval(region.box.centre.flatten(1), region.box.radius.flatten(1)),
        None if region.x is None else region.x.flatten(1),
        region.eps,
    )
    asked = carry(len(network.nodes) - 1, rows.unsqueeze(0))
    asked = replace(asked, constant=asked.constant + offset)
    asked.error.add_(rounding.gamma(0, offset.dtype) * asked.constant.abs())
    return Reduced(Rows.cat(before), asked, tuple(levels), *ends, flat)


def _nothing(like: Tensor, pixels: int) -> Rows:
    return Rows(like.new_zeros(0, pixels), like.new_zeros(0, 0), like.new_zeros(0), like.new_zeros(0))


class _Carrier:
    """Carries rows back to the input and to the outputs of unstable units, exactly on the region."""

    def __init__(self, network, intervals, boxes, unstable, columns, units):
        self.network, self.intervals, self.boxes = network, intervals, boxes
        self.unstable, self.columns, self.units = unstable, columns, units

    def __call__(self, place: int, rows: Tensor) -> Rows:
        """``rows`` (1, rows, *shape) of a node's value."""
        count = rows.shape[1]
        units = rows.new_zeros(count, self.units)
        constant = rows.new_zeros(count)
        inputs = rows.new_zeros(count, prod(self.network.nodes[0].shape))
        pending = {place: rows}
        tally = self.intervals.tally(self.network)
        for i in range(place, -1, -1):
            if i not in pending:
                continue
            row, operation = pending.pop(i), self.network.operations[i]
            if isinstance(operation, ReLU) and operation.slope:
                tally.rounded(i)
            tally.carried(i, row)
            if i == 0:
                inputs = row[0].flatten(1)
                break
            if isinstance(operation, ReLU):
                # Leaky ones are leak * z + (1 - leak) * relu(z).
                leak = operation.slope
                units[:, self.columns[i]] += (1 - leak) * row[0].flatten(1)[:, self.unstable[i]]
                slope = torch.where(self.boxes[i].lower >= 0, 1.0, leak).to(row)
                parts, added = (row * slope.unsqueeze(1),), row.new_zeros(row.shape[:2])
            else:
                parts, added = operation.backward(row)
                constant = constant + (added[0] if isinstance(added, Tensor) else added)
            tally.passed(i, self.network.nodes[i].inputs, added, pending)
            for j, part in zip(self.network.nodes[i].inputs, parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
        return Rows(inputs, units, constant, tally.loss(constant.unsqueeze(0))[0])
