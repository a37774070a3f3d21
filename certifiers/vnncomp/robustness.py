"""The property that an input is classified right within a box, as VNN-LIB text."""

from __future__ import annotations

from decimal import Decimal

from torch import Tensor


def robustness_text(lower: Tensor, upper: Tensor, label: int, classes: int, about: str = "") -> str:
    """VNN-LIB 1.0: does another logit reach the label's anywhere between ``lower`` and ``upper`` (any shape)?

    ``unsat`` proves every logit[label] - logit[j] above 0. The numbers are those of the tensors, exactly.
    ``about``: a comment, one line.
    """
    ends = list(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True))
    lines = [f"; {about}"] if about else []
    lines += [f"(declare-const X_{i} Real)" for i in range(len(ends))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (least, most) in enumerate(ends):
        lines += [f"(assert (>= X_{i} {_decimal(least)}))", f"(assert (<= X_{i} {_decimal(most)}))"]
    others = [f"    (and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label]
    return "\n".join([*lines, "(assert (or", *others, "))"]) + "\n"


def _decimal(value: float) -> str:
    """All digits of the float, so that it is read back exactly whichever way a reader rounds, and no exponent."""
    text = format(Decimal(value), "f")
    return text if "." in text else f"{text}.0"
