"""How many weights each layer keeps: pure functions of the layers' shapes and the overall keep ratio.

To add one: write a function (shapes, keep) -> kept counts, and give it a line in `BUDGETS`. All arithmetic
is in exact fractions, so that a budget is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from certifiers.errors import InputError
from certprune.registry import look_up

Shapes = Sequence[Sequence[int]]


def kept_counts(budget: str, shapes: Shapes, sparsity: float) -> list[int]:
    """Weights kept in each layer, for weight tensors of the given shapes.

    Guarantees 1 <= kept <= number of weights in every layer. `sparsity` in [0, 1) is read as the decimal
    number that it is written as: 0.99 of 50 weights removes 49.5, whatever 1 - 0.99 is in floating point.
    Raises InputError for a sparsity outside [0, 1), an unknown budget, or a budget that cannot be met.
    """
    count = look_up("budget", budget, BUDGETS)
    keep = 1 - checked_sparsity(sparsity)
    empty = [tuple(shape) for shape in shapes if math.prod(shape) == 0]
    if empty or not shapes:
        raise InputError(f"A budget needs layers with weights, but the shapes {empty or list(shapes)} came.")
    return count(shapes, keep)


def checked_sparsity(sparsity: float) -> Fraction:
    """`sparsity` as an exact fraction; InputError if it is no number in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise InputError(
            "sparsity is the fraction of weights removed, a number at least 0 and below 1 (0.95 keeps 5 % of "
            f"them), but {sparsity!r} came."
        )
    return Fraction(repr(float(sparsity)))


def uniform(shapes: Shapes, keep: Fraction) -> list[int]:
    """The same ratio in every layer, as in HYDRA: rounded to nearest (halves to even), at least one weight."""
    return [max(1, round(keep * math.prod(shape))) for shape in shapes]


def erk(shapes: Shapes, keep: Fraction) -> list[int]:
    """Erdos-Renyi-Kernel (Mocanu et al. 2018; Evci et al., RigL, 2020): thin layers keep more.

    The density of a layer is proportional to (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w), for a linear
    layer to (n_in + n_out) / (n_in n_out); so the number kept is proportional to the *sum* of the weight's
    shape. In a grouped convolution n_in is the inputs of one group. A layer whose share exceeds its weights
    stays dense, one whose share is below 1 keeps one weight, and the others share the rest in proportion.

    The kept counts add up to exactly round(keep * total), by largest remainder (ties: the earlier layer).
    Raises InputError if that total is below one weight a layer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = round(keep * sum(sizes))
    if total < len(shapes):
        raise InputError(
            f"Sparsity {float(1 - keep):g} leaves {total} of {sum(sizes)} weights, but {len(shapes)} layers "
            "need at least one each. Lower the sparsity, or prune fewer layers."
        )
    shares = _clamped_shares([Fraction(sum(shape)) for shape in shapes], sizes, total)
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _clamped_shares(ratios: list[Fraction], sizes: list[int], total: int) -> list[Fraction]:
    """`clamp(scale * ratio, 1, size)` for the one scale at which the shares add up to `total`.

    The sum grows with the scale and is linear between the points where a share enters or leaves its limits,
    so the scale is found exactly. Needs len(sizes) <= total <= sum(sizes).
    """

    def shares(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * ratio, Fraction(1)), Fraction(size)) for ratio, size in pairs]

    pairs = list(zip(ratios, sizes, strict=True))
    points = sorted({limit / ratio for ratio, size in pairs for limit in (1, size)})
    sums = [sum(shares(point)) for point in points]
    upper = next(i for i, value in enumerate(sums) if value >= total)
    if upper == 0 or sums[upper] == total:
        return shares(points[upper])
    rise = Fraction(total - sums[upper - 1]) / (sums[upper] - sums[upper - 1])
    return shares(points[upper - 1] + rise * (points[upper] - points[upper - 1]))


BUDGETS: dict[str, Callable[[Shapes, Fraction], list[int]]] = {
    "erk": erk,
    "uniform": uniform,
}
