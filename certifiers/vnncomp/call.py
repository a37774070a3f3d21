"""One node of an ONNX file, as the functions that convert it (operators.py) see it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from .extras import need

#: A map that is written out as a matrix may have so many entries (160 MB in float64).
LARGEST_MATRIX = 20_000_000


class Call:
    """One node of the file, with its inputs looked up, and ways of making torch layers of them.

    The batch is the first dimension here as in the file, so that axes need no translation; only where the file has
    vectors without a batch (``without_batch``) there is one dimension more here.
    """

    def __init__(self, reader: Any, node: Any) -> None:
        self.reader, self.node = reader, node
        self.without_batch = len(reader.runtime.shape) == 1  # vectors in, vectors out
        self.attributes = {a.name: need("onnx.helper").get_attribute_value(a) for a in node.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, place: int) -> bool:
        return place < len(self.node.input) and self.node.input[place] != ""

    def is_constant(self, place: int) -> bool:
        return self.node.input[place] in self.reader.constants

    def constant(self, place: int, what: str) -> Tensor:
        """The input at ``place``, which must not depend on the network's input."""
        if not self.has(place) or not self.is_constant(place):
            raise self.refuse(f"its {what} must be a constant")
        return self.reader.constants[self.node.input[place]]

    def optional(self, place: int, what: str) -> Tensor | None:
        return self.constant(place, what) if self.has(place) else None

    def value(self, place: int = 0) -> fx.Node:
        """The input at ``place``; a constant becomes a buffer."""
        name = self.node.input[place]
        if name in self.reader.computed:
            return self.reader.computed[name]
        return self.buffer(self.constant(place, "input"))

    def buffer(self, value: Tensor) -> fx.Node:
        name = f"constant_{len(list(self.reader.layers.buffers(recurse=False)))}"
        self.reader.layers.register_buffer(name, value)
        return self.reader.fx.get_attr(name)

    def shape(self, place: int = 0) -> tuple[int, ...]:
        """The shape of a computed input, the batch (as 1) first."""
        return (1, *self.reader.examples[self.node.input[place]].shape[1:])

    def layer(self, module: nn.Module, place: int = 0) -> fx.Node:
        return self.apply(module, self.value(place))

    def apply(self, module: nn.Module, value: fx.Node) -> fx.Node:
        name = f"{type(module).__name__.lower()}_{len(list(self.reader.layers.children()))}"
        self.reader.layers.add_module(name, module)
        return self.reader.fx.call_module(name, (value,))

    def function(self, target: Callable, *arguments: Any) -> fx.Node:
        return self.reader.fx.call_function(target, arguments)

    def axis(self, axis: int, dims: int | None = None) -> int:
        """An axis of the file among the dimensions here, ``dims`` of them (default: the first input's)."""
        dims = len(self.shape()) if dims is None else dims
        return axis % dims if axis < 0 else axis + self.without_batch

    def reshaped(self, shape: tuple[int, ...], value: fx.Node | None = None) -> fx.Node:
        """A value, the first input if none is given, in another shape, given with a batch of 1."""
        if not shape or shape[0] != 1:
            raise self.refuse("its result does not keep the batch as first dimension")
        if len(shape) == 1:
            raise self.refuse("nothing but the batch is left of the shape")
        return self.reader.fx.call_method("reshape", (self.value() if value is None else value, -1, *shape[1:]))

    def places(self, place: int = 0) -> Tensor:
        """A tensor of an input's shape that holds where each of its values stands: 0, 1, 2, ..."""
        shape = self.shape(place)
        return torch.arange(prod(shape)).reshape(shape)

    def picked(self, places: Tensor) -> fx.Node:
        """The first input's values that stand at ``places`` (a batch of 1 first), in their order and shape."""
        flat, size = places.flatten(), prod(self.shape())
        if torch.equal(flat, torch.arange(size)):
            return self.reshaped(tuple(places.shape))
        value = self.reshaped((1, size))
        if len(flat.unique()) == len(flat):
            value = self.function(torch.index_select, value, 1, self.buffer(flat))
        else:
            value = self.matrix(lambda ones: ones[:, flat], value, size, len(flat))
        return self.reshaped(tuple(places.shape), value)

    def matrix(self, linear: Callable[[Tensor], Tensor], value: fx.Node, size: int, out: int) -> fx.Node:
        """A linear function of flat values, (batch, size) to (batch, out), written out as a layer without bias."""
        if size * out > LARGEST_MATRIX:
            raise self.refuse(f"written out, it is a matrix of {out} x {size} numbers, too many to work with")
        layer = nn.Linear(size, out, bias=False)
        layer.weight = frozen(linear(torch.eye(size)).T)
        return self.apply(layer, value)

    def refuse(self, why: str) -> Exception:
        return self.reader.unsupported(self.node, why)


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone().contiguous(), requires_grad=False)
