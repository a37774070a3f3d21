"""How many weights each layer keeps, given the overall keep ratio, the layers' limits and perhaps their scores.

To add one: write a function (shapes, keep, limits, scores) -> kept counts, and give it a line in `BUDGETS`. All
arithmetic is in exact fractions, so that a budget is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from certifiers.errors import InputError
from certprune.pruning.top import top_mask
from certprune.registry import look_up

Shapes = Sequence[Sequence[int]]
Limits = Sequence[tuple[int, int]]  # the least and the most weights that each layer may keep
Scores = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Budget:
    """`count` gives the kept weights of each layer, inside the layers' limits.

    `by_scores`: it compares the scores of different layers, so they must be comparable (see
    :meth:`~certprune.pruning.plan.Pruning.counts`), and its counts move while scores are trained. `learned`: each
    layer also has a trained offset, added to all its scores before they are compared, in the spirit of HARP's trained
    rates (Zhao and Wressnegger, ICLR 2023); here the total is met exactly at every step, without a penalty.
    """

    count: Callable[[Shapes, Fraction, Limits, Scores | None], list[int]]
    by_scores: bool = False
    learned: bool = False


def kept_counts(
    budget: str,
    shapes: Shapes,
    sparsity: float,
    floor: float | int | None = None,
    caps: Sequence[int] | None = None,
    scores: Scores | None = None,
) -> list[int]:
    """Weights kept in each layer, for weight tensors of the given shapes.

    Guarantees low <= kept <= high in every layer: low is `floor`, a number of weights (an int) or a fraction of the
    layer's (below 1, rounded up), and at least 1; high is the layer's entry of `caps`, or all its weights. `sparsity`
    in [0, 1) is read as the decimal number that it is written as: 0.99 of 50 weights removes 49.5, whatever
    1 - 0.99 is in floating point. `scores`, comparable across layers, are for budgets that compare them.
    Raises InputError for a sparsity outside [0, 1), an unknown budget, or a budget that cannot be met.
    """
    chosen = look_up("budget", budget, BUDGETS)
    keep = 1 - checked_sparsity(sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    if not shapes or 0 in sizes:
        empty = [tuple(shape) for shape in shapes if math.prod(shape) == 0]
        raise InputError(f"A budget needs layers with weights, but the shapes {empty or list(shapes)} came.")
    highs = list(sizes if caps is None else caps)
    limits = [(min(least(floor, size), high), high) for size, high in zip(sizes, highs, strict=True)]
    return chosen.count(shapes, keep, limits, scores)


def checked_sparsity(sparsity: float) -> Fraction:
    """`sparsity` as an exact fraction; InputError if it is no number in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise InputError(
            "sparsity is the fraction of weights removed, a number at least 0 and below 1 (0.95 keeps 5 % of "
            f"them), but {sparsity!r} came."
        )
    return Fraction(repr(float(sparsity)))


def least(floor: float | int | None, size: int) -> int:
    """The fewest weights that a layer of `size` may keep; InputError if `floor` is no floor."""
    if floor is None:
        return 1
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool) and math.isfinite(floor)
    if not number or floor <= 0 or (floor >= 1 and floor != int(floor)):
        raise InputError(
            "floor is the least that each layer keeps: a number of weights (1, 2, ...) or a fraction of them between "
            f"0 and 1, but {floor!r} came."
        )
    return min(size, math.ceil(Fraction(repr(floor)) * size) if floor < 1 else int(floor))


def uniform(shapes: Shapes, keep: Fraction, limits: Limits, scores: Scores | None = None) -> list[int]:
    """The same ratio in every layer, as in HYDRA: rounded to nearest (halves to even), at least one weight.

    Where that breaks a layer's limits, the layer has what they allow and the others share the rest of the total.
    """
    sizes = [math.prod(shape) for shape in shapes]
    counts = [max(1, round(keep * size)) for size in sizes]
    if all(low <= count <= high for count, (low, high) in zip(counts, limits, strict=True)):
        return counts
    return _shared(sizes, sizes, keep, limits)


def erk(shapes: Shapes, keep: Fraction, limits: Limits, scores: Scores | None = None) -> list[int]:
    """Erdos-Renyi-Kernel (Mocanu et al. 2018; Evci et al., RigL, 2020): thin layers keep more.

    The density of a layer is proportional to (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w), for a linear
    layer to (n_in + n_out) / (n_in n_out); so the number kept is proportional to the *sum* of the weight's
    shape. In a grouped convolution n_in is the inputs of one group. A layer whose share is outside its limits has
    what they allow, and the others share the rest in proportion.

    The kept counts add up to exactly round(keep * total), by largest remainder (ties: the earlier layer).
    """
    return _shared([sum(shape) for shape in shapes], [math.prod(shape) for shape in shapes], keep, limits)


def by_threshold(shapes: Shapes, keep: Fraction, limits: Limits, scores: Scores | None = None) -> list[int]:
    """One threshold over the scores of all layers, so that round(keep * total) weights stay (ties: the earlier).

    The best weights of a layer stay whatever their scores, as many as the layer's floor.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = _total(sizes, keep, limits)
    if scores is None:
        raise InputError("This budget compares the scores of different layers, but none came. Give scores=.")
    ranked = []
    for score, (low, _) in zip(scores, limits, strict=True):
        flat = score.detach().flatten()
        ranked.append(flat.masked_fill(top_mask(flat, low), math.inf))
    chosen = top_mask(torch.cat(ranked), total).split(sizes)
    return torch.stack([torch.count_nonzero(part) for part in chosen]).tolist()  # one wait for a GPU, not one a layer


def _total(sizes: Sequence[int], keep: Fraction, limits: Limits) -> int:
    """round(keep * weights), if the limits allow it."""
    total = round(keep * sum(sizes))
    low, high = (sum(side) for side in zip(*limits, strict=True))
    if total < low:
        needs = "need at least one each" if low == len(sizes) else f"keep at least {low} together by their floors"
        raise InputError(
            f"Sparsity {float(1 - keep):g} leaves {total} of {sum(sizes)} weights, but {len(sizes)} layers "
            f"{needs}. Lower the sparsity, lower the floor, or prune fewer layers."
        )
    if total > high:
        raise InputError(
            f"Sparsity {float(1 - keep):g} leaves {total} of {sum(sizes)} weights, but the pattern allows no more "
            f"than {high}. Raise the sparsity to {1 - high / sum(sizes):.4g} or more."
        )
    return total


def _shared(ratios: Sequence[int], sizes: Sequence[int], keep: Fraction, limits: Limits) -> list[int]:
    """Whole shares of round(keep * sum(sizes)) in proportion to `ratios`, inside the limits."""
    total = _total(sizes, keep, limits)
    shares = _clamped_shares([Fraction(ratio) for ratio in ratios], limits, total)
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _clamped_shares(ratios: list[Fraction], limits: Limits, total: int) -> list[Fraction]:
    """`clamp(scale * ratio, low, high)` for the one scale at which the shares add up to `total`.

    The sum grows with the scale and is linear between the points where a share enters or leaves its limits,
    so the scale is found exactly. Needs sum of lows <= total <= sum of highs.
    """

    def shares(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * ratio, Fraction(low)), Fraction(high)) for ratio, (low, high) in pairs]

    pairs = list(zip(ratios, limits, strict=True))
    points = sorted({limit / ratio for ratio, pair in pairs for limit in pair})
    sums = [sum(shares(point)) for point in points]
    upper = next(i for i, value in enumerate(sums) if value >= total)
    if upper == 0 or sums[upper] == total:
        return shares(points[upper])
    rise = Fraction(total - sums[upper - 1]) / (sums[upper] - sums[upper - 1])
    return shares(points[upper - 1] + rise * (points[upper] - points[upper - 1]))


BUDGETS: dict[str, Budget] = {
    "erk": Budget(erk),
    "global": Budget(by_threshold, by_scores=True),
    "learned": Budget(by_threshold, by_scores=True, learned=True),
    "uniform": Budget(uniform),
}
