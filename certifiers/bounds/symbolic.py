"""Symbolic intervals (MixTrain; Wang et al. 2018, arXiv 1811.02625, after Neurify, arXiv 1809.08098).

Every unit is bounded through all layers below it with the one-slope relaxation of parallel.py: linear in the
input, plus one error of known size per unstable unit. Written forward these are affine forms (zonotopes), written
backward they are rows; the bounds are the same, the cost is not. So each layer takes the cheapest of

* affine forms carried forward (few pixels and errors, many units),
* rows carried backward (few units),
* patches carried backward (convolutions, whose units see little of the layers below).

Maps that do not depend on the sample yet are computed once for the whole batch, and the layers that are linear in
the input need none of this: interval arithmetic is exact there.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from . import patches
from .forms import Forms, Symbols
from .graph import Network, nonlinear_places
from .interval import Intervals
from .nonlinear import NONLINEAR
from .operations import Conv2d, Interval, Linear
from .parallel import Slopes, Winners, relaxation
from .region import dot

#: Tensors of the rows' largest size alive at once while they are carried back.
_LIVE_COPIES = 4


class Symbolic:
    """The one-slope relaxation of a network over a region: the boxes before its nonlinear layers, and margins.

    Args:
        network: bound to the weights of the moment.
        intervals: of :func:`~certifiers.bounds.interval.propagate`; used where they are exact already, and for the
            region.
        memory_mb: rows are carried in groups of about this many megabytes.
        way: "cheapest", or one of "rows", "patches", "forms" to take that one wherever it is possible (for tests
            and benchmarks; the bounds are the same).
    """

    def __init__(self, network: Network, intervals: Intervals, memory_mb: float = 512, way: str = "cheapest"):
        self.network, self.region, self.memory_mb, self.way = network, intervals.region, memory_mb, way
        self.relaxations: dict[int, Slopes | Winners] = {}
        self.boxes: dict[int, Interval] = {}
        self._symbols: dict[int, Symbols] = {}
        self._forms: Forms | None = None
        self.centres = [intervals.region.box.centre]
        last = max(nonlinear_places(network), default=0)
        for place in range(1, len(network.nodes)):
            inputs, operation = network.nodes[place].inputs, network.operations[place]
            if not isinstance(operation, NONLINEAR):
                self.centres.append(operation.forward(*(self.centres[i] for i in inputs)))
                continue
            (before,) = inputs
            if before not in self.boxes:
                self.boxes[before] = intervals.boxes[before] if intervals.exact[before] else self._box(before)
            self.relaxations[place] = relaxed = relaxation(operation, self.boxes[before])
            if place < last:
                self._symbols[place] = Symbols.of(relaxed)
            self.centres.append(relaxed.centre(self.centres[before]))

    def lower_bounds(self, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows . output``: rows ``(batch or 1, rows, classes)`` to ``(batch, rows)``."""
        least, _ = self._carry(len(self.network.nodes) - 1, rows)
        return dot(rows, self.centres[-1]) + least

    def _box(self, place: int) -> Interval:
        """The box of one node by the cheapest of the three ways."""
        ways = self._ways(place)
        way = self.way if self.way in ways else min(ways, key=lambda name: ways[name])
        if way == "patches":
            chain = patches.chain(self.network, place)
            ends = patches.deviations(self.network, chain, self.relaxations, self.region, self.memory_mb)
        elif way == "forms":
            ends = self._form_deviations(place)
        else:
            ends = self._row_deviations(place)
        centre = self.centres[place]
        return Interval(centre + (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2)

    def _ways(self, place: int) -> dict[str, float]:
        """About how many multiply-adds each possible way takes for all units of a node."""
        batch, units = len(self.centres[0]), prod(self.network.nodes[place].shape)
        steps = list(self._behind(place))
        costs = {"rows": sum(units * _work(self.network, i) * (1 if shared else batch) for i, shared in steps)}
        chain = patches.chain(self.network, place)
        if chain is not None:
            costs["patches"] = patches.work(self.network, chain, batch)
        ancestors = sorted(i for i, _ in steps)
        missing = ancestors if self._forms is None else self._forms.missing(ancestors)
        pixels = prod(self.network.nodes[0].shape) if self._forms is None else self._forms.pixels
        costs["forms"] = 0.0
        for i in missing:
            errors = sum(len(self._symbols[j].samples) for j, _ in self._behind(i) if j in self._symbols)
            # With an error in it, the map is each sample's own: no nonlinear layer behind means none.
            own = any(isinstance(self.network.operations[j], NONLINEAR) for j, _ in self._behind(i))
            costs["forms"] += _work(self.network, i) * (pixels * (batch if own else 1) + errors)
        return costs

    def _behind(self, place: int) -> Iterator[tuple[int, bool]]:
        """The places that ``place`` depends on, itself first, and whether rows from it are still shared there."""
        shared = {place: True}
        for i in range(place, 0, -1):
            if i not in shared:
                continue
            yield i, shared[i]
            for j in self.network.nodes[i].inputs:
                same = shared[i] and not isinstance(self.network.operations[i], NONLINEAR)
                shared[j] = shared.get(j, True) and same

    def _form_deviations(self, place: int) -> tuple[Tensor, Tensor]:
        if self._forms is None:
            self._forms = Forms(self.network, self.region, self.relaxations, self._symbols)
        return self._forms.deviations(place, sorted(i for i, _ in self._behind(place)))

    def _row_deviations(self, place: int) -> tuple[Tensor, Tensor]:
        shape, like = self.network.nodes[place].shape, self.centres[0]
        units = prod(shape)
        largest = max(prod(self.network.nodes[i].shape) for i, _ in self._behind(place))
        group = int(self.memory_mb * 2**20 / (_LIVE_COPIES * len(like) * largest * like.element_size()))
        ends = []
        for start in range(0, units, max(group, 1)):
            some = torch.arange(start, min(start + max(group, 1), units), device=like.device)
            one_hot = like.new_zeros(len(some), units).scatter(1, some.unsqueeze(1), 1.0)
            ends.append(self._carry(place, one_hot.reshape(1, -1, *shape)))
        return tuple(torch.cat([part[end] for part in ends], 1).unflatten(1, shape) for end in (0, 1))

    def _carry(self, place: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least and most of ``rows . (node - its centre)``: rows ``(batch or 1, rows, *shape)`` to (batch, rows)."""
        pending, error = {place: rows}, torch.zeros((), dtype=rows.dtype, device=rows.device)
        for i in range(place, 0, -1):
            if i not in pending:
                continue
            row, operation, inputs = pending.pop(i), self.network.operations[i], self.network.nodes[i].inputs
            if isinstance(operation, NONLINEAR):
                relaxed = self.relaxations[i]
                error = error + dot(row.abs(), relaxed.radius)
                parts = (relaxed.backward(row),)
            else:
                parts, _ = operation.backward(row)
            for j, part in zip(inputs, parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
        if 0 not in pending:  # nothing depends on the input
            return -error, error
        reach = self.region.deviation(pending[0])
        return reach.lower - error, reach.upper + error


def _work(network: Network, place: int) -> float:
    """Multiply-adds of one sample through one operation."""
    operation, units = network.operations[place], prod(network.nodes[place].shape)
    if isinstance(operation, Linear):
        return operation.weight.numel()
    if isinstance(operation, Conv2d):
        return units * operation.weight[0].numel()
    return units
