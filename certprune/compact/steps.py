"""A network as a list of steps that can be rewritten: the operations of bound propagation, in double precision.

Step 0 is the input and has no operation; a step's ``inputs`` are places before it, and the last step gives the
logits. Rewriting is pure: every pass takes a list of steps and returns another one that computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.bounds import Intervals, Network, Region, propagate, trace
from certifiers.bounds.graph import Node
from certifiers.bounds.linear import crown_intervals
from certifiers.bounds.nonlinear import NONLINEAR, MaxPool2d, ReLU
from certifiers.bounds.operations import AveragePool2d, Conv2d, Interval, Linear, Reshape, Select

MEMORY_MB = 512  # of one group of rows while the units of the whole domain are bounded


@dataclass(frozen=True)
class Step:
    """``operation`` applied to the results of the steps ``inputs``; one sample of its result has ``shape``."""

    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    operation: Any = None


Steps = list[Step]


def steps_of(model: nn.Module, input_shape: tuple[int, ...]) -> Steps:
    """The steps of a model on the CPU, in evaluation mode, with its weights of the moment."""
    network = trace(model, input_shape).bind()
    pairs = zip(network.nodes, network.operations, strict=True)
    return [Step(node.inputs, tuple(node.shape), _double(operation)) for node, operation in pairs]


def _double(operation: Any) -> Any:
    """The operation with its tensors detached, in double precision (indices stay integers)."""
    if operation is None:
        return None
    changed = {
        name: value.detach().to(torch.float64 if value.is_floating_point() else value.dtype)
        for name, value in vars(operation).items()
        if isinstance(value, Tensor)
    }
    return replace(operation, **changed) if changed else operation


def network_of(steps: Steps) -> Network:
    """The steps in the form that bound propagation takes."""
    nodes = tuple(Node(str(place), step.inputs, step.shape, None) for place, step in enumerate(steps))
    return Network(nodes, tuple(step.operation for step in steps))


def domain_boxes(steps: Steps, method: str) -> list[Interval]:
    """What every step's units can be over the whole domain [0, 1]^d, ``(1, *shape)``.

    ``method``: "ibp" (interval arithmetic), or "crown" (backward bounds where intervals leave a ReLU open). A radius of
    0 says that a unit is constant, and the box in front of an activation holds in exact arithmetic: where large terms
    cancel, rounding must not make a unit look dead.
    """
    network, corner = network_of(steps), torch.zeros(1, *steps[0].shape, dtype=torch.float64)
    region = Region(Interval.between(corner, corner + 1))
    with torch.no_grad():
        sound: Intervals = propagate(network, region, account_for_rounding=True)
        if method == "crown":
            sound = crown_intervals(network, sound, MEMORY_MB, meet=True)
        boxes, positive = [region.box], [True]
        decided = {step.inputs[0] for step in steps if isinstance(step.operation, NONLINEAR)}
        for place, step in enumerate(steps[1:], start=1):
            inputs, operation = [boxes[i] for i in step.inputs], step.operation
            box = operation.interval(*inputs)
            if place in decided:
                exact = box.radius == 0
                if isinstance(operation, (Linear, Conv2d)) and positive[step.inputs[0]]:
                    exact = exact | _of_one_sign(operation, inputs[0])
                wide = sound.boxes[place]
                box = Interval(torch.where(exact, box.centre, wide.centre), torch.where(exact, box.radius, wide.radius))
            boxes.append(box)
            cut = isinstance(operation, ReLU) and not operation.slope
            kept = isinstance(operation, (MaxPool2d, AveragePool2d, Reshape, Select)) and positive[step.inputs[0]]
            positive.append(cut or kept)
    return boxes


def _of_one_sign(layer: Linear | Conv2d, box: Interval) -> Tensor:
    """The outputs whose terms are all of one sign where inputs are not negative: nothing in them can cancel."""
    found = []
    for sign in (1.0, -1.0):
        bias = None if layer.bias is None else (sign * layer.bias).clamp(min=0)
        above = replace(layer, weight=(sign * layer.weight).clamp(min=0), bias=bias).forward(box.upper)
        found.append(above == 0)
    return found[0] | found[1]


def crown_work(steps: Steps) -> float:
    """About how many multiply-adds the backward bounds of all ReLUs' inputs take, each unit through all before it."""
    total, behind = 0.0, 0.0
    for step in steps:
        if isinstance(step.operation, (Linear, Conv2d)):
            behind += prod(step.shape[1:]) * step.operation.weight.numel()
        elif isinstance(step.operation, NONLINEAR):
            total += behind * prod(steps[step.inputs[0]].shape)
    return total


def consumers(steps: Sequence[Step]) -> list[list[int]]:
    """By place: the steps that read it, once for each reading."""
    found: list[list[int]] = [[] for _ in steps]
    for place, step in enumerate(steps):
        for source in step.inputs:
            found[source].append(place)
    return found


def size(steps: Steps) -> int:
    """Entries of all weights, by which one rewriting counts as smaller than another."""
    return sum(s.operation.weight.numel() for s in steps if isinstance(s.operation, (Linear, Conv2d))) + len(steps)


def without_unread(steps: Steps) -> Steps:
    """The same without steps that the last one does not depend on; the input stays."""
    wanted = {0, len(steps) - 1}
    for place in range(len(steps) - 1, 0, -1):
        if place in wanted:
            wanted.update(steps[place].inputs)
    order = sorted(wanted)
    new = {old: place for place, old in enumerate(order)}
    return [replace(steps[old], inputs=tuple(new[i] for i in steps[old].inputs)) for old in order]


def dropped(steps: Steps, identities: dict[int, int]) -> Steps:
    """The steps without those of ``identities``, each read at the place before it that it stands for."""

    def where(place: int) -> int:
        while place in identities:
            place = identities[place]
        return place

    if where(len(steps) - 1) == 0:  # nothing but the input would be left
        return steps
    last = where(len(steps) - 1)
    changed = [replace(step, inputs=tuple(where(i) for i in step.inputs)) for step in steps]
    return without_unread(changed[: last + 1])
