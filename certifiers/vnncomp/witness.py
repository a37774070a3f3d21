"""A counterexample as the competition writes it: ``((X_0 0.5) (X_1 ...) ... (Y_0 ...))``."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_COMPETITION = re.compile(rf"\(\s*X_(\d+)\s+{_NUMBER}\s*\)")
_ASSIGNMENT = re.compile(rf"^\s*x(\d+)\s*=\s*{_NUMBER}\s*$", re.MULTILINE)  # as Marabou prints it


class Witness(NamedTuple):
    """An input (inputs,) and the network's output for it (outputs,), float32."""

    x: Tensor
    y: Tensor


def witness_text(witness: Witness) -> str:
    """The witness in the competition's form, one value a line, with digits that give back the same float32."""
    names = [("X", witness.x), ("Y", witness.y)]
    lines = [f"({kind}_{i} {value!r})" for kind, values in names for i, value in enumerate(values.tolist())]
    return "(" + "\n".join(lines) + ")"


def parse_witness(text: str, inputs: int) -> Tensor | None:
    """The input (inputs,), float64, in a verifier's output; None if it holds none. What it says of Y is not read.

    Both the competition's form and lines ``x0 = 0.5`` are known. InputError for a witness that is incomplete.
    """
    found = _COMPETITION.findall(text) or _ASSIGNMENT.findall(text)
    values = {int(number): float(value) for number, value in found}
    if not values:
        return None
    if sorted(values) != list(range(inputs)):
        raise InputError(
            f"A counterexample of {inputs} inputs must give X_0 to X_{inputs - 1}, but {len(values)} of them came, "
            f"X_{min(values)} to X_{max(values)}."
        )
    return torch.tensor([values[i] for i in range(inputs)], dtype=torch.float64)
