"""What a property asks, apart from how it is written: is there an input of a box whose output is in a polytope?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Polytope:
    """The outputs y (m,) with ``a @ y <= b`` in every row: ``a`` (rows, m), ``b`` (rows,), float64.

    Where a property asks nothing of the output there is one row of zeros, which every output meets.
    """

    a: Tensor
    b: Tensor

    def excess(self, y: Tensor) -> Tensor:
        """``max(a @ y - b)`` over the rows, for outputs (..., m): at most 0 exactly where y lies inside."""
        return (y @ self.a.to(y).T - self.b.to(y)).amax(-1)


@dataclass(frozen=True)
class Box:
    """One box of inputs and what is forbidden there: a counterexample has its output in any of ``polytopes``.

    ``lower``, ``upper``: (inputs,), float64, in the order of the network's input read row by row.
    """

    lower: Tensor
    upper: Tensor
    polytopes: tuple[Polytope, ...]

    def inner(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The box of all numbers of ``dtype`` within; where an edge holds none, the one nearest to its middle."""
        lower, upper = _rounded(self.lower, dtype, up=True), _rounded(self.upper, dtype, up=False)
        middle = ((self.lower + self.upper) / 2).to(dtype)
        empty = lower > upper
        return torch.where(empty, middle, lower), torch.where(empty, middle, upper)

    def holds(self, x: Tensor) -> bool:
        """Does an input (inputs,) of some float type lie in the box, up to what :meth:`inner` says of its type?"""
        lower, upper = self.inner(x.dtype)
        return bool(((x >= lower) & (x <= upper)).all())  # False for NaN


@dataclass(frozen=True)
class Property:
    """A counterexample is one of any of ``boxes``; without one the property holds (``unsat``)."""

    inputs: int
    outputs: int
    boxes: tuple[Box, ...]

    def is_counterexample(self, x: Tensor, y: Tensor) -> bool:
        """Whether the input (inputs,) lies in a box whose polytopes hold the output (outputs,), in float64."""
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            return False
        y = y.double()
        return any(box.holds(x) and any(bool(p.excess(y) <= 0) for p in box.polytopes) for box in self.boxes)


def _rounded(value: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """The nearest numbers of ``dtype`` that are not below (``up``) or not above ``value``."""
    near = value.to(dtype)
    wrong = near.double() < value if up else near.double() > value
    end = torch.full_like(near, float("inf") if up else float("-inf"))
    return torch.where(wrong, torch.nextafter(near, end), near)
