"""ONNX operators that are made of ReLUs: what they compute, written with these, exactly (in real numbers)."""

from __future__ import annotations

import operator

from torch import fx, nn

from .call import Call


def clip(call: Call) -> fx.Node:
    """``min(max(x, least), most)``; from opset 11 on the ends are inputs, before they were attributes."""
    ends = []
    for place, name in ((1, "min"), (2, "max")):
        end = call.optional(place, name)
        ends.append(call.attribute(name) if end is None else float(end))
    value = call.value()
    if ends[0] is not None:
        value = _larger(call, value, ends[0])
    return value if ends[1] is None else _smaller(call, value, ends[1])


def maximum(call: Call) -> fx.Node:
    """``max(a, b) = b + relu(a - b)``, of values and constants."""
    return _folded(call, _larger)


def minimum(call: Call) -> fx.Node:
    """``min(a, b) = b - relu(b - a)``."""
    return _folded(call, _smaller)


def absolute(call: Call) -> fx.Node:
    """``relu(x) + relu(-x)``."""
    x = call.value()
    other = call.apply(nn.ReLU(), call.function(operator.neg, x))
    return call.function(operator.add, call.layer(nn.ReLU()), other)


def prelu(call: Call) -> fx.Node:
    """``relu(x) - slope * relu(-x)``."""
    slope = call.constant(1, "slope")
    if slope.dim() < len(call.shape()):
        slope = slope[None]
    negative = call.apply(nn.ReLU(), call.function(operator.neg, call.value()))
    negative = call.function(operator.mul, negative, call.buffer(slope))
    return call.function(operator.sub, call.layer(nn.ReLU()), negative)


def _folded(call: Call, two) -> fx.Node:
    """A value first, for arithmetic of a constant with a constant is none; then one after the other."""
    places = sorted(range(len(call.node.input)), key=call.is_constant)
    result = call.value(places[0])
    for place in places[1:]:
        result = two(call, result, call.value(place))
    return result


def _larger(call: Call, a: fx.Node, b: fx.Node | float) -> fx.Node:
    return call.function(operator.add, call.apply(nn.ReLU(), call.function(operator.sub, a, b)), b)


def _smaller(call: Call, a: fx.Node, b: fx.Node | float) -> fx.Node:
    return call.function(operator.sub, b, call.apply(nn.ReLU(), call.function(operator.sub, b, a)))
