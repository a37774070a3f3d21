"""ONNX operators that only move values, or put zeros between them: which value stands where afterwards.

Each is tried on the places themselves, a tensor of whole numbers of the input's shape; what comes out says which value
goes where, and becomes a reshape, a selection or, where values are repeated, a matrix of zeros and ones.
"""

from __future__ import annotations

import operator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .call import Call, frozen


def flatten(call: Call) -> fx.Node:
    shape, axis = call.shape(), call.attribute("axis", 1)
    if axis % len(shape) != 1 and any(size != 1 for size in shape[1 : axis % len(shape)]):
        raise call.refuse(f"it flattens from axis {axis}, across the batch")
    return call.layer(nn.Flatten())


def reshape(call: Call) -> fx.Node:
    wanted = call.constant(1, "shape").tolist()
    before = call.shape()
    if not call.attribute("allowzero", 0):
        wanted = [before[i] if size == 0 else size for i, size in enumerate(wanted)]
    return call.reshaped(tuple(torch.zeros(before).reshape(wanted).shape))


def squeeze(call: Call) -> fx.Node:
    axes = call.attribute("axes") or (call.constant(1, "axes").tolist() if call.has(1) else None)
    before = call.shape()
    axes = range(1, len(before)) if axes is None else [axis % len(before) for axis in axes]
    return call.reshaped(tuple(size for i, size in enumerate(before) if i not in axes or size != 1))


def unsqueeze(call: Call) -> fx.Node:
    axes = call.attribute("axes") or call.constant(1, "axes").tolist()
    after = list(call.shape())
    for axis in sorted(axis % (len(after) + len(axes)) for axis in axes):
        after.insert(axis, 1)
    return call.reshaped(tuple(after))


def transpose(call: Call) -> fx.Node:
    places = call.places()
    order = call.attribute("perm", range(places.dim())[::-1])
    return call.picked(places.permute(*order))


def gather(call: Call) -> fx.Node:
    places, indices = call.places(), call.constant(1, "indices")
    axis = call.axis(call.attribute("axis", 0))
    indices = indices % places.shape[axis]  # negative ones count from the end
    taken = places.index_select(axis, indices.flatten())
    return call.picked(taken.reshape(*places.shape[:axis], *indices.shape, *places.shape[axis + 1 :]))


def slice_(call: Call) -> fx.Node:
    """From opset 10 on its bounds are inputs, before they were attributes."""
    places = call.places()
    if "starts" in call.attributes:
        starts, ends, axes = (call.attribute(name) for name in ("starts", "ends", "axes"))
        steps = None
    else:
        starts, ends = (call.constant(i, name).tolist() for i, name in ((1, "starts"), (2, "ends")))
        axes, steps = (
            None if (found := call.optional(i, name)) is None else found.tolist()
            for i, name in ((3, "axes"), (4, "steps"))
        )
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = call.axis(axis)
        kept = range(places.shape[axis])[slice(start, end, step)]
        places = places.index_select(axis, torch.tensor(list(kept), dtype=torch.long))
    return call.picked(places)


def split(call: Call) -> list[fx.Node]:
    places, outputs = call.places(), len(call.node.output)
    axis = call.axis(call.attribute("axis", 0))
    sizes = call.attribute("split") or (call.constant(1, "sizes").tolist() if call.has(1) else None)
    size = -(-places.shape[axis] // outputs)  # else parts of one size, the last may be smaller
    return [call.picked(part) for part in places.split(size if sizes is None else sizes, axis)]


def expand(call: Call) -> fx.Node:
    places, shape = call.places(), call.constant(1, "shape").tolist()
    return call.picked(places.broadcast_to(torch.broadcast_shapes(places.shape, tuple(shape))))


def concat(call: Call) -> fx.Node:
    """Each part is put among zeros, and these are added up; constant parts become one constant."""
    parts = range(len(call.node.input))
    shapes = [_part_shape(call, part) for part in parts]
    axis = call.axis(call.attribute("axis"), len(shapes[0]))
    if axis == 0:
        raise call.refuse("it puts one batch behind the other")
    whole = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    spots = torch.arange(prod(whole)).reshape(whole).split([shape[axis] for shape in shapes], axis)
    constant, result = torch.zeros(whole), None
    for part in parts:
        if call.is_constant(part):
            constant.view(-1)[spots[part].flatten()] = call.constant(part, "part").float().flatten()
            continue
        placed = _among_zeros(call, part, spots[part], whole, axis)
        result = placed if result is None else call.function(operator.add, result, placed)
    return call.function(operator.add, result, call.buffer(constant)) if constant.any() else result


def _part_shape(call: Call, part: int) -> tuple[int, ...]:
    if not call.is_constant(part):
        return call.shape(part)
    shape = tuple(call.constant(part, "part").shape)
    return (1, *shape) if call.without_batch else shape


def _among_zeros(call: Call, part: int, spots: Tensor, whole: tuple[int, ...], axis: int) -> fx.Node:
    """An input's values at these spots of a tensor of zeros."""
    size = spots.numel()
    if len(whole) == 4 and axis == 1:  # channels of an image: a convolution of one pixel
        layer = nn.Conv2d(spots.shape[1], whole[1], 1, bias=False)
        channels = spots[0, :, 0, 0] // (whole[2] * whole[3])
        layer.weight = frozen(F.one_hot(channels, whole[1]).T.float()[:, :, None, None])
        return call.layer(layer, part)

    def spread(ones: Tensor) -> Tensor:
        return ones.new_zeros(len(ones), prod(whole)).index_copy(1, spots.flatten(), ones)

    flat = call.reshaped((1, size), call.value(part))
    return call.reshaped(whole, call.matrix(spread, flat, size, prod(whole)))


def pad(call: Call) -> fx.Node:
    if call.attribute("mode", b"constant") != b"constant":
        raise call.refuse(f"it pads by {call.attribute('mode').decode()}, and only constants are known")
    pads = call.attribute("pads") or call.constant(1, "pads").tolist()
    value = call.optional(2, "value")
    value = float(call.attribute("value", 0.0) if value is None else value)
    shape, half = call.shape(), len(pads) // 2
    axes = call.constant(3, "axes").tolist() if call.has(3) else range(half)
    each = [(0, 0)] * len(shape)
    for axis, begin, end in zip(axes, pads[:half], pads[half:], strict=True):
        each[call.axis(axis)] = (begin, end)
    if each[0] != (0, 0):
        raise call.refuse("it pads the batch")
    if min(min(ends) for ends in each) < 0:
        raise call.refuse(f"it cuts values off, by {list(pads)}")
    outer = tuple(begin + size + end for size, (begin, end) in zip(shape, each, strict=True))
    if len(shape) == 4 and each[1] == (0, 0):
        result = padded_image(call, call.value(), shape[1], each[2:])
    else:
        spots = torch.arange(prod(outer)).reshape(outer)
        for axis, (begin, _) in enumerate(each):
            spots = spots.narrow(axis, begin, shape[axis])
        result = _among_zeros(call, 0, spots, outer, 0)
    if not value:
        return result
    inside = F.pad(torch.ones(shape), [end for ends in reversed(each) for end in ends])
    return call.function(operator.add, result, call.buffer(value * (1 - inside)))


def padded_image(call: Call, value: fx.Node, channels: int, ends: list[tuple[int, int]]) -> fx.Node:
    """An image with zeros around it, so many (begin, end) above and below, left and right.

    As a convolution of each channel by itself, whose kernel is a single 1: padded by the larger of the two ends on
    both sides, a kernel of K cells cuts K - 1 off again, and where its 1 stands says on which side.
    """
    if all(pair == (0, 0) for pair in ends):
        return value
    most = [max(pair) for pair in ends]
    kernel = [2 * p - sum(pair) + 1 for p, pair in zip(most, ends, strict=True)]
    layer = nn.Conv2d(channels, channels, kernel, padding=most, groups=channels, bias=False)
    weight = torch.zeros(channels, 1, *kernel)
    weight[:, :, most[0] - ends[0][0], most[1] - ends[1][0]] = 1.0
    layer.weight = frozen(weight)
    return call.apply(layer, value)
