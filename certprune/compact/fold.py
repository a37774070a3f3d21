"""Affine steps folded into each other: BatchNorm into the convolution before it, constants into biases, linear layers
into one, and ReLUs that are proven never to cut anything.

Each pass is exact in exact arithmetic; what would not be (a shift in front of a padded convolution) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from certifiers.bounds.nonlinear import ReLU
from certifiers.bounds.operations import Add, Conv2d, Interval, Linear, Reshape, Scale
from certprune.compact.steps import Step, Steps, consumers, dropped, without_unread


def fold_affine(steps: Steps) -> Steps:
    """Fold scales and merge linear layers until nothing changes."""
    passes: tuple[Callable[[Steps], Steps | None], ...] = (_fold_one_scale, _merge_two_linear)
    while (changed := next((found for one in passes if (found := one(steps)) is not None), None)) is not None:
        steps = changed
    return steps


def per_channel(value: Tensor | float, shape: tuple[int, ...]) -> Tensor | None:
    """``value``, which broadcasts against ``shape``, as one number for each channel; None if it varies in one."""
    full = torch.as_tensor(value, dtype=torch.float64).expand(shape).reshape(shape[0], -1)
    return full[:, 0].clone() if torch.equal(full, full[:, :1].expand_as(full)) else None


def with_bias(operation: Linear | Conv2d, added: Tensor) -> Linear | Conv2d:
    """The operation with ``added`` (out,) on top of its bias; one of zeros leaves it as it is."""
    if not added.any():
        return operation
    return replace(operation, bias=added if operation.bias is None else operation.bias + added)


def _fold_one_scale(steps: Steps) -> Steps | None:
    """The steps with one scale fewer (or one nearer to a layer that takes it up); None if there is none to fold."""
    readers = consumers(steps)
    for place, step in enumerate(steps):
        if not isinstance(step.operation, Scale):
            continue
        source = step.inputs[0]
        behind = readers[place][0] if len(readers[place]) == 1 else None
        alone = len(readers[source]) == 1
        changed = None
        if _is_identity(step):
            changed = dropped(steps, {place: source})
            changed = changed if len(changed) < len(steps) else None
        if changed is None and alone:
            changed = _into_layer_before(steps, place, source)
        if changed is None and behind is not None:
            changed = _into_layer_behind(steps, place, source, behind, readers)
        if changed is not None:
            return changed
    return None


def _is_identity(step: Step) -> bool:
    scale, shift = (torch.as_tensor(v) for v in (step.operation.scale, step.operation.shift))
    return bool((scale == 1).all() and (shift == 0).all())


def _with(steps: Steps, changes: dict[int, Step]) -> Steps:
    """The steps with those at some places replaced."""
    return [changes.get(place, step) for place, step in enumerate(steps)]


def _into_layer_before(steps: Steps, place: int, source: int) -> Steps | None:
    scale, before = steps[place].operation, steps[source]
    if isinstance(before.operation, Scale):
        first = before.operation
        both = Scale(scale.scale * first.scale, scale.scale * first.shift + scale.shift)
        return without_unread(_with(steps, {place: replace(steps[place], inputs=before.inputs, operation=both)}))
    if not isinstance(before.operation, (Linear, Conv2d)):
        return None
    factor, shift = (per_channel(v, before.shape) for v in (scale.scale, scale.shift))
    if factor is None or shift is None:
        return None
    layer = before.operation
    weight = layer.weight * factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
    bias = None if layer.bias is None else layer.bias * factor
    layer = with_bias(replace(layer, weight=weight, bias=bias), shift)
    return dropped(_with(steps, {source: replace(before, operation=layer)}), {place: source})


def _into_layer_behind(steps: Steps, place: int, source: int, behind: int, readers: list[list[int]]) -> Steps | None:
    step, reader = steps[place], steps[behind]
    scale, layer = step.operation, reader.operation
    if isinstance(layer, Reshape) and _leads_to_linear(steps, behind, readers):
        # The scale moves behind the reshape, where a linear layer takes it up.
        parts = (torch.as_tensor(v, dtype=torch.float64).expand(step.shape) for v in (scale.scale, scale.shift))
        moved = Scale(*(part.reshape(reader.shape) for part in parts))
        first = Step((source,), reader.shape, layer)
        return _with(steps, {place: first, behind: Step((place,), reader.shape, moved)})
    if isinstance(layer, Linear):
        factor, shift = (torch.as_tensor(v, dtype=torch.float64).expand(step.shape) for v in (scale.scale, scale.shift))
        layer = with_bias(replace(layer, weight=layer.weight * factor), layer.weight @ shift)
    elif isinstance(layer, Conv2d) and layer.groups == 1:
        factor = per_channel(scale.scale, step.shape)
        shift = torch.as_tensor(scale.shift, dtype=torch.float64).expand(step.shape)
        added = per_channel(layer.linear(shift.unsqueeze(0))[0], reader.shape)
        if factor is None or added is None:  # a shifted border differs from the padding's zeros
            return None
        layer = with_bias(replace(layer, weight=layer.weight * factor.reshape(-1, 1, 1)), added)
    else:
        return None
    return dropped(_with(steps, {behind: replace(reader, operation=layer)}), {place: source})


def _leads_to_linear(steps: Steps, place: int, readers: list[list[int]]) -> bool:
    return len(readers[place]) == 1 and isinstance(steps[readers[place][0]].operation, Linear)


def _merge_two_linear(steps: Steps) -> Steps | None:
    """One linear layer for two in a row where it has no more weights; None if there are no such two."""
    readers = consumers(steps)
    for place, step in enumerate(steps):
        if not isinstance(step.operation, Linear) or len(readers[step.inputs[0]]) != 1:
            continue
        first, second = steps[step.inputs[0]], step.operation
        if not isinstance(first.operation, Linear):
            continue
        merged = second.weight @ first.operation.weight
        if merged.numel() > first.operation.weight.numel() + second.weight.numel():
            continue
        layer = Linear(merged, second.bias)
        if first.operation.bias is not None:
            layer = with_bias(layer, second.weight @ first.operation.bias)
        return without_unread(_with(steps, {place: replace(step, inputs=first.inputs, operation=layer)}))
    return None


def drop_idle(steps: Steps, boxes: list[Interval]) -> Steps:
    """Without ReLUs that cut nothing anywhere in the domain, and with sums of a constant as shifts."""
    identities: dict[int, int] = {}
    changed = list(steps)
    for place, step in enumerate(steps):
        if isinstance(step.operation, ReLU) and bool((boxes[step.inputs[0]].lower >= 0).all()):
            identities[place] = step.inputs[0]
        elif isinstance(step.operation, Add):
            (a, b), sign = step.inputs, step.operation.sign
            if not boxes[b].radius.any():
                changed[place] = replace(step, inputs=(a,), operation=Scale(1.0, sign * boxes[b].centre[0]))
            elif not boxes[a].radius.any():
                changed[place] = replace(step, inputs=(b,), operation=Scale(sign, boxes[a].centre[0]))
    return dropped(changed, identities)


def split_active(steps: Steps, boxes: list[Interval]) -> Steps:
    """Fully connected units that are proven active on the whole domain, folded into the layer behind them.

    In ``W2 relu(W1 x + b1)`` the active units A are linear: ``W2_A (W1_A x + b1_A)``, one matrix for all of them.
    Done where that matrix is smaller than their weights were.
    """
    readers = consumers(steps)
    for place, step in enumerate(steps):
        if not isinstance(step.operation, ReLU) or len(step.shape) != 1 or len(readers[place]) != 1:
            continue
        first, second = step.inputs[0], readers[place][0]
        layers = steps[first].operation, steps[second].operation
        if not all(isinstance(layer, Linear) for layer in layers) or len(readers[first]) != 1:
            continue
        active = boxes[first].lower[0] >= 0
        inputs, outputs, count = layers[0].weight.shape[1], layers[1].weight.shape[0], int(active.sum())
        if count == len(active) or inputs * outputs >= count * (inputs + outputs):
            continue
        return split_active(*_split(steps, boxes, first, place, second, active))
    return steps


def _split(
    steps: Steps, boxes: list[Interval], first: int, relu: int, second: int, active: Tensor
) -> tuple[Steps, list[Interval]]:
    """The steps with the active units' own way beside the ReLU's, and their boxes as far as they are asked for."""
    before, after = steps[first].operation, steps[second].operation
    source, width, outputs = steps[first].inputs[0], int((~active).sum()), steps[second].shape
    bias = torch.zeros(len(active), dtype=torch.float64) if before.bias is None else before.bias
    straight = with_bias(
        Linear(after.weight[:, active] @ before.weight[active], None), after.weight[:, active] @ bias[active]
    )
    new = list(steps[:second])
    new[first] = replace(steps[first], shape=(width,), operation=Linear(before.weight[~active], bias[~active]))
    new[relu] = replace(steps[relu], shape=(width,))
    new += [
        Step((relu,), outputs, Linear(after.weight[:, ~active], after.bias)),
        Step((source,), outputs, straight),
        Step((second, second + 1), outputs, Add()),
    ]
    for step in steps[second + 1 :]:
        new.append(replace(step, inputs=tuple(i + 2 if i >= second else i for i in step.inputs)))
    kept = Interval(boxes[first].centre[:, ~active], boxes[first].radius[:, ~active])
    old = [*boxes[: second + 1], boxes[second], boxes[second], *boxes[second + 1 :]]
    old[first] = kept
    return new, old
