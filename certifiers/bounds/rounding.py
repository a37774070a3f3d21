"""What rounding may have cost: bounds that hold in exact arithmetic although they are computed in floating point.

Every sum of n products that a machine adds up in whatever order is off by at most ``gamma(n)`` times the sum of their
absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3). So two numbers are enough:
how many terms each operation sums (its ``terms``), and the *reach* of each node, the sum of the absolute values that
its value is made of, over the whole region. Boxes are made wider, and backward bounds lower, by what follows.

The claim is about the network whose weights are the floating-point numbers at hand, evaluated in exact arithmetic, and
rests on sums of products as such: convolutions by Winograd's or Fourier's transform, and products of fewer bits
(TF32), are outside, so single precision is relied on only where :func:`single_is_single`. A product that underflows
is off by at most the smallest normal number, whether the machine keeps smaller ones or not, and is counted as well.
"""

from __future__ import annotations

import os
from collections.abc import Container
from math import prod
from typing import Any

import torch
from torch import Tensor

from .nonlinear import NONLINEAR, ReLU
from .operations import Interval, total_terms
from .region import dot

#: More terms than any formula below leaves out, and more than the rounding of these formulas themselves can take back.
_SPARE_TERMS, _SPARE = 16, 1.05
_LARGEST = 1e12
_FEWER_BITS = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # variables that ask a CPU for them


def gamma(terms: int, dtype: torch.dtype) -> float:
    """n u / (1 - n u), u the unit roundoff, with something to spare; infinite from where it means nothing."""
    nu = (terms + _SPARE_TERMS) * torch.finfo(dtype).eps / 2
    return _SPARE * nu / (1 - nu) if nu < 0.01 else torch.inf


def single_is_single(device: torch.device) -> bool:
    """Whether float32 sums of products are that here: on a GPU they may be TF32 or Winograd's by default, and on a CPU
    users may ask for bfloat16."""
    if device.type != "cpu" or any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in _FEWER_BITS):
        return False
    mkldnn = torch.backends.mkldnn
    places = (torch.backends, mkldnn, getattr(mkldnn, "conv", None), getattr(mkldnn, "matmul", None))
    if any(getattr(place, "fp32_precision", "none") not in ("none", "ieee") for place in places):
        return False
    return torch.get_float32_matmul_precision() == "highest"


def underflow(terms: int, like: Tensor) -> float:
    """By how much the underflow of products, and what this formula leaves out, may move a sum of so many."""
    return (terms + _SPARE_TERMS) * torch.finfo(like.dtype).tiny


def size(box: Interval) -> Tensor:
    """The largest absolute value in a box, ``(batch, *shape)``."""
    return box.centre.abs() + box.radius


def between(lower: Tensor, upper: Tensor) -> Interval:
    """A box that holds [lower, upper], whose ends as they are read lie outside too."""
    box = Interval.between(lower, upper)
    return Interval(box.centre, box.radius + gamma(0, lower.dtype) * torch.maximum(lower.abs(), upper.abs()))


def widened(operation: Any, box: Interval, inputs: list[Interval]) -> tuple[Interval, Tensor]:
    """The ``box`` that an operation computes for inputs in boxes, wider by what rounding may have cost; its reach."""
    reach = torch.maximum(operation.reach(*map(size, inputs)), size(box))
    lost = gamma(operation.terms, reach.dtype) * reach + underflow(operation.terms, reach)
    box = Interval(box.centre, box.radius + lost)
    return box, torch.maximum(reach, size(box))


class Tally:
    """Adds up, along one backward pass, how far below its result the bound in exact arithmetic may lie.

    Errors of coefficients count with the reach of the node that these are about. ``samples``: which sample of the
    batch each first index of the rows belongs to; None: in order.
    """

    def __init__(self, operations: tuple[Any, ...], reach: list[Tensor], samples: Tensor | None = None):
        self.operations, self.reach, self.samples = operations, reach, samples
        self._loss: Tensor | float = 0.0
        self._roundings: dict[int, int] = {}  # by node: those that its coefficients bring with them

    @torch.no_grad()
    def carried(self, place: int, rows: Tensor, evaluated: bool = False) -> None:
        """``rows`` of node ``place`` are about to be carried through its operation, or evaluated over its box."""
        terms, shape = self._roundings.pop(place, 0), rows.shape[2:]
        if place == 0:
            terms += total_terms(shape)
        else:
            terms += prod(shape) if evaluated else self.operations[place].backward_terms(shape)
        if terms:
            # The constants met on the way are added up in the end, one from each operation.
            share = gamma(terms + len(self.operations), rows.dtype)
            reach = self.reach[place] if self.samples is None else self.reach[place][self.samples]
            self._loss = self._loss + share * dot(rows.abs(), reach)

    @torch.no_grad()
    def passed(self, place: int, inputs: tuple[int, ...], constant: Tensor | float, pending: Container[int]) -> None:
        """They were: with this ``constant``, and coefficients of ``inputs``, to be added to those ``pending``."""
        operation = self.operations[place]
        for i in inputs:  # a coefficient that is off by so much is about a value of that size
            reach = self.reach[i] if self.samples is None else self.reach[i][self.samples]
            lost = underflow(operation.backward_terms(self.reach[place].shape[1:]), reach) * reach.flatten(1).sum(1)
            self._loss = self._loss + lost.unsqueeze(1)
        relaxed = isinstance(operation, NONLINEAR)
        if isinstance(operation, ReLU):  # all terms of its constant have one sign: their sum is their size
            terms = total_terms(self.reach[place].shape[1:]) + len(self.operations)
            self._loss = self._loss + gamma(terms, constant.dtype) * constant.abs()
        for i in inputs:
            if relaxed or i in pending:
                self.rounded(i)

    def rounded(self, place: int) -> None:
        """The coefficients of ``place`` are rounded once more: multiplied by a slope, or added to others."""
        self._roundings[place] = self._roundings.get(place, 0) + 4

    @torch.no_grad()
    def loss(self, bound: Tensor) -> Tensor:
        """By how much ``bound`` (samples, rows) may be too high, the rounding of the difference included."""
        tiny = torch.finfo(bound.dtype).tiny ** 0.5  # far above what underflow can add up to
        loss = _SPARE * self._loss + gamma(0, bound.dtype) * bound.abs() + tiny
        return torch.where(loss < _LARGEST, loss, torch.inf)

    def below(self, bound: Tensor) -> Tensor:
        """``bound`` less that."""
        return bound - self.loss(bound)
