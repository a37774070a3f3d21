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
import torch.nn.functional as F
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
    """One input's questions about the unstable units alone: is, wherever the input lies, one of its rows above 0?

    ``before``: the values before the units as :class:`Rows`; units are ordered so that each depends on those of
    earlier levels only. ``levels``: the units that one layer holds. ``asked``: the linear functions of the output
    whose sign is asked for. ``groups``: (rows,), which question each of them belongs to, 0, 1, 2, ...; None: each is
    a question by itself. ``lower``, ``upper``: (units,), the box of each unit's z. ``region``: of the one input,
    flattened to (1, pixels).
    """

    before: Rows
    asked: Rows
    levels: tuple[slice, ...]
    lower: Tensor
    upper: Tensor
    region: Region
    groups: Tensor | None = None

    @cached_property
    def members(self) -> list[Tensor]:
        """The rows of each question."""
        if self.groups is None:
            return list(torch.arange(len(self.asked)).unsqueeze(1))
        return [(self.groups == question).nonzero().flatten() for question in range(int(self.groups.max()) + 1)]

    @cached_property
    def choices(self) -> Tensor:
        """(questions, rows of the largest): 0 where a question has a row, -inf where it has fewer."""
        most = max(map(len, self.members))
        there = [[0.0] * len(rows) + [-torch.inf] * (most - len(rows)) for rows in self.members]
        return self.lower.new_tensor(there).reshape(-1, most)

    def combined(self, question: Tensor, weights: Tensor) -> Rows:
        """Combinations of the rows of each ``question`` (count,), by ``weights`` (count, rows of the largest) >= 0."""
        if self.choices.shape[1] == 1:
            return self.asked[torch.cat(self.members)[question]]
        places = torch.stack([F.pad(rows, (0, self.choices.shape[1] - len(rows))) for rows in self.members])
        each = weights.new_zeros(len(question), len(self.asked)).scatter_add(1, places[question], weights)
        parts = [each @ part for part in (self.asked.inputs, self.asked.units, self.asked.constant)]
        with torch.no_grad():
            spare = rounding.gamma(self.choices.shape[1], self.lower.dtype)
            error = each @ (self.asked.error + spare * self.reach(self.asked))
        return Rows(*parts, error)

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
        """The rows asked, at inputs ``x`` (points, pixels) of the region: (points, rows)."""
        h = x.new_zeros(len(x), len(self.lower))
        for level in self.levels:
            z = self.before[level]
            h[:, level] = torch.relu(x @ z.inputs.T + h @ z.units.T + z.constant)
        return x @ self.asked.inputs.T + h @ self.asked.units.T + self.asked.constant

    def answers(self, x: Tensor) -> Tensor:
        """The largest row of each question there, (points, questions): at most 0 where it is not true."""
        values = self.values(x)
        return torch.stack([values[:, rows].amax(1) for rows in self.members], 1)


def reduce(
    network: Network, intervals: Intervals, rows: Tensor, offset: Tensor, groups: Tensor | None = None
) -> Reduced:
    """The questions about ``rows . output + offset``, rows (rows, outputs), for the one input of ``intervals``.

    Args:
        network: bound to its weights. Use float64: the matrices are what every later claim rests on.
        intervals: boxes of all nodes for a batch of one, as tight as can be had, rounding accounted for.
        groups: (rows,), the question of each row; None: each is one by itself.

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
    return Reduced(Rows.cat(before), asked, tuple(levels), *ends, flat, groups)


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
                slope = torch.where(self.boxes[i].lower >= 0, row.new_ones(()), row.new_tensor(leak))
                parts, added = (row * slope.unsqueeze(1),), row.new_zeros(row.shape[:2])
            else:
                parts, added = operation.backward(row)
                constant = constant + (added[0] if isinstance(added, Tensor) else added)
            tally.passed(i, self.network.nodes[i].inputs, added, pending)
            for j, part in zip(self.network.nodes[i].inputs, parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
        return Rows(inputs, units, constant, tally.loss(constant.unsqueeze(0))[0])
