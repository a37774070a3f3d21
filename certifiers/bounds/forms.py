"""Forward affine forms: every node's value as linear in the input's pixels and in one error symbol per unstable unit.

A node's value is its centre (kept elsewhere) plus ``inputs . (input - centre of the box)`` plus, for each nonlinear
layer before it, ``errors[layer] . symbols in [-1, 1]``. Up to the first nonlinear layer the maps are one for all
samples; pixels that no sample may change have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Network
from .nonlinear import NONLINEAR
from .operations import Add
from .parallel import Slopes, Winners
from .region import Region


class Symbols(NamedTuple):
    """The error symbols of one nonlinear layer: the units with an error, by sample and flat place."""

    samples: Tensor
    units: Tensor

    @staticmethod
    def of(relaxed: Slopes | Winners) -> Symbols:
        return Symbols(*(relaxed.radius.detach().flatten(1) > 0).nonzero(as_tuple=True))


class Form(NamedTuple):
    """Directions of one node: ``inputs`` (batch or 1, pixels, *shape), and ``errors[layer]`` (symbols, *shape)."""

    inputs: Tensor
    errors: dict[int, Tensor]


class Forms:
    """The affine forms of a network's nodes, each computed when first asked for."""

    def __init__(
        self,
        network: Network,
        region: Region,
        relaxations: dict[int, Slopes | Winners],
        symbols: dict[int, Symbols],
    ):
        self.network, self.relaxations, self.symbols = network, relaxations, symbols
        flat = region.box.radius.flatten(1)
        pixels = (flat.detach().amax(0) > 0).nonzero().squeeze(1)
        self.region = region.of_pixels(pixels)
        one_hot = flat.new_zeros(len(pixels), flat.shape[1]).scatter(1, pixels.unsqueeze(1), 1.0)
        self._forms = {0: Form(one_hot.reshape(1, -1, *network.nodes[0].shape), {})}

    @property
    def pixels(self) -> int:
        return self._forms[0].inputs.shape[1]

    def missing(self, ancestors: list[int]) -> list[int]:
        """Those of ``ancestors`` whose form has not been computed yet."""
        return [place for place in ancestors if place not in self._forms]

    def deviations(self, place: int, ancestors: list[int]) -> tuple[Tensor, Tensor]:
        """How far each unit of node ``place`` can be from its centre: least and most, ``(batch, *shape)``.

        ``ancestors``: the places it depends on, itself included, ascending.
        """
        for i in self.missing(ancestors):
            self._forms[i] = self._next(i)
        form = self._forms[place]
        reach = self.region.deviation(form.inputs.flatten(2).transpose(1, 2))
        error = torch.zeros_like(reach.centre)
        for layer, rows in form.errors.items():
            error = error.index_add(0, self.symbols[layer].samples, rows.flatten(1).abs())
        shape = self.network.nodes[place].shape
        return (reach.lower - error).unflatten(1, shape), (reach.upper + error).unflatten(1, shape)

    def _next(self, place: int) -> Form:
        operation = self.network.operations[place]
        forms = [self._forms[i] for i in self.network.nodes[place].inputs]
        if isinstance(operation, NONLINEAR):
            return self._relaxed(place, forms[0])
        if isinstance(operation, Add):
            return _sum(forms[0], forms[1], operation)
        inputs = operation.linear(forms[0].inputs.flatten(0, 1)).unflatten(0, forms[0].inputs.shape[:2])
        return Form(inputs, {layer: operation.linear(rows) for layer, rows in forms[0].errors.items()})

    def _relaxed(self, place: int, form: Form) -> Form:
        relaxed = self.relaxations[place]
        errors = {layer: relaxed.forward(rows, self.symbols[layer].samples) for layer, rows in form.errors.items()}
        samples, units = self.symbols[place]
        size = relaxed.radius.flatten(1)
        fresh = size.new_zeros(len(samples), size.shape[1]).scatter(
            1, units.unsqueeze(1), size[samples, units].unsqueeze(1)
        )
        errors[place] = fresh.unflatten(1, self.network.nodes[place].shape)
        return Form(relaxed.forward(form.inputs), errors)


def _sum(a: Form, b: Form, add: Add) -> Form:
    """Symbols that both sides share add up (they are the same unknown numbers); the others stand alone."""
    errors = dict(a.errors)
    for layer, rows in b.errors.items():
        errors[layer] = add.linear(errors[layer], rows) if layer in errors else add.sign * rows
    return Form(add.linear(a.inputs, b.inputs), errors)
