"""A reduced question as a mixed-integer linear program, solved by HiGHS (through scipy): best where few units are left.

One binary for each unstable unit says whether it is active (Tjeng et al. 2019, arXiv 1711.07356).
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from .reduced import Reduced

TOLERANCE = 1e-6  # of HiGHS, for a binary's and a constraint's violation


def least_value(problem: Reduced, question: int, seconds: float) -> tuple[float, Tensor | None]:
    """A lower bound of one row asked, and the best input found, (pixels,) or None.

    The bound is what HiGHS proves less what its tolerances may hide (see :func:`slack`).
    """
    box = problem.region.box
    units, pixels = problem.before.units.shape[0], problem.before.inputs.shape[1]
    asked = problem.asked
    cost = np.concatenate([asked.inputs[question].numpy(), asked.units[question].numpy(), np.zeros(units)])
    lower, upper = problem.lower.numpy(), problem.upper.numpy()
    ends = Bounds(
        np.concatenate([box.lower[0].numpy(), np.zeros(units), lower >= 0]),
        np.concatenate([box.upper[0].numpy(), upper.clip(min=0), upper > 0]),
    )
    with _silent():
        found = milp(
            cost,
            constraints=_relu_constraints(problem, lower, upper),
            bounds=ends,
            integrality=np.repeat([0, 0, 1], [pixels, units, units]),
            options={"time_limit": max(seconds, 0.01)},
        )
    proven = found.mip_dual_bound
    if proven is None or not np.isfinite(proven):  # without a binary left it is a linear program, and its value exact
        proven = found.fun if found.status == 0 else -np.inf
    bound = proven + float(asked.constant[question]) - slack(problem, question)
    point = None if found.x is None else torch.from_numpy(found.x[:pixels].copy())
    return float(bound), point


@contextlib.contextmanager
def _silent():
    """HiGHS writes notes to the process's standard output, past Python; `verify` answers there."""
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to write to
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _relu_constraints(problem: Reduced, lower: np.ndarray, upper: np.ndarray) -> LinearConstraint:
    """With a binary a for each unit: h >= z, h <= z - lower (1 - a), h <= upper a; h >= 0 is among the bounds."""
    inputs, units = (sparse.csr_matrix(part.numpy()) for part in (problem.before.inputs, problem.before.units))
    constant = problem.before.constant.numpy()
    count = len(constant)
    one, none = sparse.identity(count), sparse.csr_matrix((count, count))
    no_input = sparse.csr_matrix(inputs.shape)
    rows = [
        sparse.hstack([inputs, units - one, none]),
        sparse.hstack([-inputs, one - units, sparse.diags(-lower)]),
        sparse.hstack([no_input, one, sparse.diags(-upper)]),
    ]
    return LinearConstraint(sparse.vstack(rows), -np.inf, np.concatenate([-constant, constant - lower, 0 * constant]))


def slack(problem: Reduced, question: int) -> float:
    """How much a solution that keeps every constraint within the tolerances can be below the true least value.

    Each unit's output may be off by the tolerance and by as much of its range as a binary off by it lets through;
    an error at a unit grows by the weights between it and the question.
    """
    weight = problem.asked.units[question].abs().clone()
    for level in reversed(problem.levels):
        earlier = slice(0, level.start)
        weight[earlier] += weight[level] @ problem.before.units[level, earlier].abs()
    off = TOLERANCE * (2 + problem.upper - problem.lower)
    pixels = TOLERANCE * (problem.asked.inputs[question].abs().sum() + (weight @ problem.before.inputs.abs()).sum())
    return float(torch.dot(weight, off) + pixels)
