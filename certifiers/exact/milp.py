"""A reduced question as a mixed-integer linear program, solved by HiGHS (through scipy), in search of a counterexample.

One binary for each unstable unit says whether it is active (Tjeng et al. 2019, arXiv 1711.07356). Where few units are
left it finds what attacks and splits miss. What HiGHS proves is not taken: it holds up to its tolerances only.
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


def lowest(problem: Reduced, question: int, seconds: float) -> tuple[float, Tensor | None]:
    """About the least that a question's largest row can be, and the input where, (pixels,); inf and None if none."""
    box = problem.region.box
    units, pixels = problem.before.units.shape[0], problem.before.inputs.shape[1]
    asked = problem.asked[problem.members[question]]
    # The last variable is above every row.
    above = sparse.hstack(
        [asked.inputs.numpy(), asked.units.numpy(), sparse.csr_matrix((len(asked), units)), -np.ones((len(asked), 1))]
    )
    lower, upper = problem.lower.numpy(), problem.upper.numpy()
    ends = Bounds(
        np.concatenate([box.lower[0].numpy(), np.zeros(units), lower >= 0, [-np.inf]]),
        np.concatenate([box.upper[0].numpy(), upper.clip(min=0), upper > 0, [np.inf]]),
    )
    with _silent():
        found = milp(
            np.repeat([0, 1], [pixels + 2 * units, 1]),
            constraints=[
                _relu_constraints(problem, lower, upper),
                LinearConstraint(above, -np.inf, -asked.constant.numpy()),
            ],
            bounds=ends,
            integrality=np.repeat([0, 0, 1, 0], [pixels, units, units, 1]),
            options={"time_limit": max(seconds, 0.01)},
        )
    if found.x is None:
        return float("inf"), None
    return float(found.fun), torch.from_numpy(found.x[:pixels].copy())


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
    no_input, last = sparse.csr_matrix(inputs.shape), sparse.csr_matrix((count, 1))
    rows = [
        sparse.hstack([inputs, units - one, none, last]),
        sparse.hstack([-inputs, one - units, sparse.diags(-lower), last]),
        sparse.hstack([no_input, one, sparse.diags(-upper), last]),
    ]
    return LinearConstraint(sparse.vstack(rows), -np.inf, np.concatenate([-constant, constant - lower, 0 * constant]))
