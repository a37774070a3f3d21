"""The passes in order: fold, narrow, split, until nothing gets smaller; then a plain module, held against the old."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.bounds.operations import Linear, Select
from certifiers.checks import check_model, device_of
from certifiers.errors import InputError, UnsupportedLayer
from certprune.compact.fold import drop_idle, fold_affine, split_active
from certprune.compact.layers import build
from certprune.compact.modules import described, named
from certprune.compact.steps import Step, Steps, crown_work, domain_boxes, size, steps_of
from certprune.compact.units import narrow

METHODS = ("crown", "ibp")
ROUNDS = 4  # each needs less than the one before; in practice the second changes nothing
GATHER_COST = 20  # multiply-adds in the time that it takes to gather one feature (measured, 256 inputs on a CPU)
CHECKED = 1000  # inputs on which the result is held against the original
CROWN_WORK = 5e9  # multiply-adds up to which units are bounded by crown if nobody says how; some 15 s on one thread
TOLERANCE = 1e-8  # of the largest logit, in double precision


@dataclass(frozen=True)
class Compacted:
    """``model``: plain, in eval mode, the dtype and device of the original. ``description``: see layers.py.

    ``origin`` says where it comes from, in plain JSON values.
    """

    model: nn.Module
    description: list[dict[str, Any]]
    input_shape: tuple[int, ...]
    classes: int
    origin: dict[str, Any] = field(default_factory=dict)


def compact(model: nn.Module, input_shape: tuple[int, ...], method: str | None = None) -> Compacted:
    """A smaller network that computes what ``model`` computes, for every input in [0, 1]^d.

    Exact in exact arithmetic: channels and units go whose inputs or outputs are all zero, and those that bounds over
    the whole domain prove constant (inactive ReLUs, dead branches) go into the biases behind them; fully connected
    units proven active are folded into the next layer where that is smaller; BatchNorm goes into the layer before it;
    features that a linear layer does not read are left out where gathering the others is worth it. Computed in double
    precision and checked on 1,000 inputs before the weights are rounded to the model's dtype.

    The guarantee of a certificate is about the network that was certified: certify the compacted one itself. Its
    interval bounds are no looser than the original's, up to rounding; nor are linear ones, but for rare differences in
    the fifth digit, where tighter boxes lead CROWN to another slope.

    Args:
        model: in eval mode, without masks (``materialize`` it first). It is not changed.
        input_shape: of one input, without the batch.
        method: how units are bounded over the domain: "crown" finds more, "ibp" is for large networks; None: crown
            where it takes seconds.

    Raises:
        InputError: an unknown method, a model in training mode or with masks.
        UnsupportedLayer: an operation whose bounds are not known.
    """
    if method is not None and method not in METHODS:
        raise InputError(f"Units are bounded over the domain by {' or '.join(METHODS)}, but {method!r} was asked for.")
    check_model(model)
    shape = tuple(input_shape)
    whole = copy.deepcopy(model).cpu().double()  # so that BatchNorm's scales are not rounded before they are folded
    steps = _smaller(steps_of(whole, shape), method)
    rows, tensors = described(steps)
    state = dict(named(rows, tensors))
    _check_same(whole, build(rows, state, torch.float64), shape)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    small = build(rows, state, dtype).to(device_of(model))
    return Compacted(small, rows, shape, steps[-1].shape[0])


def _smaller(steps: Steps, method: str | None) -> Steps:
    steps = fold_affine(steps)
    steps = narrow(steps, domain_boxes(steps, "ibp"))  # cheap, and leaves less for the other method
    method = method or ("crown" if crown_work(steps) <= CROWN_WORK else "ibp")
    for _ in range(ROUNDS):
        before = size(steps)
        steps = narrow(steps, domain_boxes(steps, method))
        boxes = domain_boxes(steps, method)
        split = split_active(steps, boxes)
        steps = fold_affine(drop_idle(steps, boxes) if split is steps else split)
        if size(steps) >= before:
            break
    return _gathered(steps)


def _gathered(steps: Steps) -> Steps:
    """With a selection in front of linear layers that leave many of their inputs unread."""
    new: Steps = []
    where: dict[int, int] = {}
    for place, step in enumerate(steps):
        step = replace(step, inputs=tuple(where[i] for i in step.inputs))
        if isinstance(step.operation, Linear):
            weight = step.operation.weight
            index = weight.any(0).nonzero().squeeze(1)
            saved = len(weight) * (weight.shape[1] - len(index))
            if len(index) and saved > GATHER_COST * len(index):
                new.append(Step(step.inputs, (len(index),), Select(index, weight.shape[1])))
                step = replace(step, inputs=(len(new) - 1,), operation=replace(step.operation, weight=weight[:, index]))
        new.append(step)
        where[place] = len(new) - 1
    return new


@torch.no_grad()
def _check_same(whole: nn.Module, small: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise unless both, in double precision, compute the same at random points and corners of the domain."""
    x = _points(shape)
    gap, largest = 0.0, 1.0
    for part in x.split(100):
        expected = whole(part)
        largest = max(largest, float(expected.abs().amax()))
        gap = max(gap, float((small(part) - expected).abs().amax()))
    if not gap <= TOLERANCE * largest:
        raise UnsupportedLayer(
            f"The compacted network computes other values than the original: logits differ by {gap / largest:.2g} of "
            "the largest. It was not used. Please report this with the model."
        )


def _points(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(CHECKED, *shape, generator=generator, dtype=torch.float64)
    x[::2] = x[::2].round()
    x[0], x[2] = 0.0, 1.0
    return x
