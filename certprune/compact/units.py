"""Which units are constant on the whole domain and which are needed; the network without the others.

A unit is *folded* where it is constant and each of its readers takes up the constant itself: a linear layer into its
bias, whatever unit it is; a convolution, whose zero padding no constant can imitate, a whole constant channel as a
constant map of its outputs. A unit is *needed* where the logits depend on it, other than through folded units. What is
built here gives every needed unit its value; other units may hold anything, for nobody reads them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from certifiers.bounds.nonlinear import MaxPool2d
from certifiers.bounds.operations import AveragePool2d, Conv2d, Interval, Linear, Reshape, Scale, Select
from certprune.compact.fold import per_channel, with_bias
from certprune.compact.steps import Step, Steps, consumers, without_unread


def narrow(steps: Steps, boxes: list[Interval]) -> Steps:
    """The network without the channels and units that nobody needs; ``boxes`` are those of the whole domain."""
    constant = [box.radius[0] == 0 for box in boxes]
    values = [box.centre[0] for box in boxes]
    folded = _folded(steps, constant)
    needed = _needed(steps, folded)
    kept = _kept(steps, needed)
    return _rebuilt(steps, kept, folded, values)


def _folded(steps: Steps, constant: list[Tensor]) -> list[Tensor]:
    """By step and unit: constant, and taken up by every reader. The logits have a reader that takes up nothing."""
    readers = consumers(steps)
    found: list[Tensor] = list(constant)
    found[-1] = torch.zeros_like(constant[-1])
    for place in range(len(steps) - 2, -1, -1):
        before = None
        while before is None or not torch.equal(before, found[place]):  # one reader may undo another's whole channel
            before = found[place]
            for reader in readers[place]:
                found[place] = found[place] & _takes_up(steps[reader], found[place], found[reader])
    return found


def _takes_up(reader: Step, constant: Tensor, folded: Tensor) -> Tensor:
    """Which constant units of its input a reader takes up, or need not, its own being folded."""
    operation = reader.operation
    if isinstance(operation, Linear):
        return torch.ones_like(constant)
    if isinstance(operation, Conv2d):
        whole = constant.flatten(1).all(1) & (operation.groups == 1)
        return whole.reshape(-1, 1, 1).expand_as(constant)
    if isinstance(operation, (AveragePool2d, MaxPool2d)):
        return folded.flatten(1).all(1).reshape(-1, 1, 1).expand_as(constant)
    if isinstance(operation, Reshape):
        return folded.reshape(constant.shape)
    if isinstance(operation, Select):
        return torch.ones_like(constant).index_copy(0, operation.index, folded)
    return folded  # unit by unit: activations, scales, sums


def _needed(steps: Steps, folded: list[Tensor]) -> list[Tensor]:
    needed = [torch.zeros_like(unit) for unit in folded]
    needed[-1] |= True
    for place in range(len(steps) - 1, 0, -1):
        for source in set(steps[place].inputs):
            needed[source] |= _reads(steps[place], needed[place], folded[source]) & ~folded[source]
    return needed


def _reads(step: Step, needed: Tensor, folded: Tensor) -> Tensor:
    """The units of an input that the needed ones of a step depend on."""
    operation = step.operation
    if isinstance(operation, MaxPool2d):  # by channel, which is all that can be removed
        return needed.flatten(1).any(1).reshape(-1, 1, 1).expand_as(folded)
    if isinstance(operation, (Linear, Conv2d)):
        operation = replace(operation, weight=(operation.weight != 0).double(), bias=None)
    if isinstance(operation, (Linear, Conv2d, AveragePool2d, Reshape, Select)):
        (rows,), _ = operation.backward(needed.double().unsqueeze(0).unsqueeze(0))
        return rows[0, 0] > 0
    return needed


def _kept(steps: Steps, needed: list[Tensor]) -> list[Tensor]:
    """By step: the channels (or flat units) that stay, ascending. Those of an elementwise step are its inputs'."""
    groups = _Groups(len(steps))
    whole = {0, len(steps) - 1}
    flattened: dict[int, int] = {}
    for place, step in enumerate(steps):
        operation = step.operation
        if isinstance(operation, Conv2d) and operation.groups > 1:
            whole |= {place, *step.inputs}
        elif isinstance(operation, Reshape):
            if len(operation.before) == 3 and len(operation.after) == 1:
                flattened[place] = step.inputs[0]
            else:
                whole |= {place, *step.inputs}
        elif step.inputs and not isinstance(operation, (Linear, Conv2d, Select)):
            for source in step.inputs:
                groups.unite(place, source)
    _settle_flattened(groups, whole, flattened)
    pinned = {groups.of(place) for place in whole}
    keep: dict[int, Tensor] = {}
    for place, units in enumerate(needed):
        group = groups.of(place)
        some = units.reshape(len(units), -1).any(1) | (group in pinned)
        keep[group] = keep[group] | some if group in keep else some
    for some in keep.values():
        some[0] |= not some.any()  # a layer has a channel at least
    while _follow(steps, groups, flattened, keep):
        pass
    return [keep[groups.of(place)].nonzero().squeeze(1) for place in range(len(steps))]


def _follow(steps: Steps, groups: _Groups, flattened: dict[int, int], keep: dict[int, Tensor]) -> bool:
    """Keep what a flattened map and a selection must have on either side; whether that was more than before."""
    wider = dict(keep)
    for place, step in enumerate(steps):
        if isinstance(step.operation, Select):
            source = groups.of(step.inputs[0])
            wider[source] = wider[source].index_fill(0, step.operation.index[wider[groups.of(place)]], True)
        elif place in flattened:
            source = groups.of(flattened[place])
            flat = wider[groups.of(place)].unflatten(0, (len(wider[source]), -1))
            wider[source] = wider[source] | flat.any(1)
            wider[groups.of(place)] = wider[source].repeat_interleave(flat.shape[1])
    changed = any(not torch.equal(wider[group], keep[group]) for group in keep)
    keep.update(wider)
    return changed


def _settle_flattened(groups: _Groups, whole: set[int], flattened: dict[int, int]) -> None:
    """Flat units behind a map follow its channels; where two maps would lead, or the flat ones stay, all do."""
    changed = True
    while changed:
        before = len(whole)
        leaders: dict[int, set[int]] = {}
        for place, source in flattened.items():
            leaders.setdefault(groups.of(place), set()).add(groups.of(source))
        pinned = {groups.of(place) for place in whole}
        for place, source in flattened.items():
            if groups.of(place) in pinned or len(leaders[groups.of(place)]) > 1:
                whole |= {place, source}
        changed = len(whole) != before


class _Groups:
    """Steps whose channels go or stay together."""

    def __init__(self, count: int):
        self._above = list(range(count))

    def of(self, place: int) -> int:
        while self._above[place] != place:
            place = self._above[place]
        return place

    def unite(self, a: int, b: int) -> None:
        self._above[self.of(a)] = self.of(b)


def _rebuilt(steps: Steps, kept: list[Tensor], folded: list[Tensor], values: list[Tensor]) -> Steps:
    new: Steps = [steps[0]]
    where = {0: 0}
    for place, step in enumerate(steps[1:], start=1):
        inputs, shape = tuple(where[i] for i in step.inputs), (len(kept[place]), *step.shape[1:])
        source = step.inputs[0]
        operation, added = _narrowed(step, kept[source], kept[place], folded[source], values[source])
        if isinstance(operation, Reshape):
            operation = Reshape(new[inputs[0]].shape, shape if len(step.shape) == 1 else step.shape)
        new.append(Step(inputs, shape, operation))
        if added is not None:
            new.append(Step((len(new) - 1,), shape, Scale(1.0, added)))
        where[place] = len(new) - 1
    return without_unread(new)


def _narrowed(
    step: Step, sources: Tensor, kept: Tensor, folded: Tensor, values: Tensor
) -> tuple[object, Tensor | None]:
    """The operation between what is kept before and after it, and a constant map to add to its result, or None."""
    operation = step.operation
    constants = torch.where(folded, values, 0.0)
    if isinstance(operation, Linear):
        layer = _rows(operation, kept)
        layer = with_bias(layer, layer.weight @ constants)
        return replace(layer, weight=torch.where(folded, 0.0, layer.weight)[:, sources]), None
    if isinstance(operation, Conv2d) and operation.groups == 1:
        layer = _rows(operation, kept)
        channels = folded.flatten(1).all(1)
        added = layer.linear(torch.where(channels.reshape(-1, 1, 1), values, 0.0).unsqueeze(0))[0]
        weight = torch.where(channels.reshape(-1, 1, 1), 0.0, layer.weight)[:, sources]
        flat = per_channel(added, tuple(added.shape))
        layer = replace(layer, weight=weight)
        return (layer, added) if flat is None else (with_bias(layer, flat), None)
    if isinstance(operation, Scale):
        return Scale(*(_part(value, step.shape, kept) for value in (operation.scale, operation.shift))), None
    if isinstance(operation, Select):
        new_place = torch.zeros(operation.before, dtype=torch.long)
        new_place[sources] = torch.arange(len(sources))
        return Select(new_place[operation.index[kept]], len(sources)), None
    return operation, None


def _rows(layer: Linear | Conv2d, kept: Tensor) -> Linear | Conv2d:
    return replace(layer, weight=layer.weight[kept], bias=None if layer.bias is None else layer.bias[kept])


def _part(value: Tensor | float, shape: tuple[int, ...], kept: Tensor) -> Tensor | float:
    """A scale's constant for the channels that are kept; numbers and maps for all channels alike stay as they are."""
    if not isinstance(value, Tensor) or value.dim() < len(shape) or value.shape[0] == 1:
        return value
    return value[kept]
