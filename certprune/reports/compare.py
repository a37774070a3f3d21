"""Paired differences between networks: over the images of one run, or over the seeds of several.

Two networks certified on the same images are compared image by image, which is far sharper than looking whether two
intervals overlap. Differences are in certified accuracy, first minus second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from certifiers.verdict import Status
from certprune.reports.ledgers import LedgerView
from certprune.reports.look import Network
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import Column, Rate, ordered, points
from certprune.reports.seeds import check_same_recipe, mean_rate
from certprune.reports.smoothed import SmoothedView

BASELINES = ("magnitude", "random", "snip", "taylor")
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """``certified`` is first minus second, as a fraction; ``pairs`` counts images, or seeds, that were paired."""

    first: str
    second: str
    variant: str  # the first network's folder name
    eps: float
    over: str  # "images" or "seeds"
    pairs: int
    certified: Rate
    first_only: int | None = None  # images that only the first network certifies
    second_only: int | None = None

    columns: ClassVar[tuple[Column, ...]] = (
        Column("Network", lambda row: row.first, left=True),
        Column("against", lambda row: row.second, left=True),
        Column("eps", lambda row: f"{row.eps:g}"),
        Column("Certified, points", lambda row: points(row.certified, sign=True)),
        Column("Only the first", lambda row: "" if row.first_only is None else f"{row.first_only:,}"),
        Column("Only the second", lambda row: "" if row.second_only is None else f"{row.second_only:,}"),
        Column("Pairs", lambda row: f"{row.pairs:,} {row.over}"),
    )


def pairs_to_compare(run: RunView) -> list[tuple[Variant, Variant]]:
    """Each learned criterion against each baseline that shares all but it, and against the dense network.

    All but the criterion: sparsity, budget, and how it was pruned (schedule, pattern and floor); nor has the baseline
    an objective of its own that is another (see :func:`same_loss`).
    """
    pairs = []
    learned = [v for v in run.variants if v.criterion and v.criterion not in BASELINES]
    for variant in learned:
        for other in run.variants:
            equal = (other.sparsity, other.budget, other.how) == (variant.sparsity, variant.budget, variant.how)
            baseline = equal and other.criterion in BASELINES and same_loss(variant, other)
            if baseline or other.name == "dense":
                pairs.append((variant, other))
    return pairs


def same_loss(learned: Variant | Network, baseline: Variant | Network) -> bool:
    """Whether a baseline was trained for the recipe's objective, or for the learned one's own."""
    return baseline.objective in (None, learned.objective)


def differences(runs: Sequence[RunView], eps: float | None = None) -> list[Difference]:
    """The paired differences at ``eps`` (default: the main eps of the first run).

    One run: paired over images. Several runs of one recipe: paired over seeds, a 95 % t-interval over the seeds'
    differences, each over the images that both networks have. A seed counts where neither lacks images which other
    networks of its run have, as in :func:`~certprune.reports.seeds.aggregate`. Raises InputError if several runs are
    not one recipe with different seeds.
    """
    if len(runs) != 1:
        check_same_recipe(runs)
    eps = runs[0].main_eps if eps is None else eps
    if eps is None:
        return []
    if len(runs) == 1:
        return _over_images(runs[0], eps)
    return _over_seeds(runs, eps)


def _over_images(run: RunView, eps: float) -> list[Difference]:
    found = []
    for first, second in pairs_to_compare(run):
        one, other = first.ledger(eps), second.ledger(eps)
        if one is None or other is None or not alike(one, other):
            continue
        only_one, only_other, n = discordant(one, other)
        if n:
            rate = paired_rate(only_one, only_other, n)
            found.append(Difference(*names(run, first, second), eps, "images", n, rate, only_one, only_other))
    return found


def _over_seeds(runs: Sequence[RunView], eps: float) -> list[Difference]:
    found = []
    for first, second in pairs_to_compare(runs[0]):
        gaps = []
        for run in runs:
            here = [run.variant(variant.name) for variant in (first, second)]
            ledgers = [ledger for variant in here if variant is not None and (ledger := variant.ledger(eps))]
            if len(ledgers) == 2 and alike(*ledgers) and all(map(run.whole, ledgers)):
                only_one, only_other, n = discordant(*ledgers)
                gaps.append((only_one - only_other) / n)
        if gaps:
            found.append(
                Difference(*names(runs[0], first, second), eps, "seeds", len(gaps), mean_rate(gaps, bounded=False))
            )
    return found


def alike(one: LedgerView | SmoothedView, other: LedgerView | SmoothedView) -> bool:
    """Whether two ledgers are about images of one split, and were certified in one norm and in one way."""
    return (one.images, one.settings) == (other.images, other.settings)


def discordant(one: LedgerView, other: LedgerView) -> tuple[int, int, int]:
    """Images certified by the first ledger alone, by the second alone, and how many images both have decided."""
    first, second = (
        {verdict.index: verdict.status is Status.certified for verdict in ledger.verdicts} for ledger in (one, other)
    )
    return counted(first, second)


def counted(first: Mapping[int, bool], second: Mapping[int, bool]) -> tuple[int, int, int]:
    """How many images, by their index, only the first certifies, only the second, and how many both have decided."""
    shared = first.keys() & second.keys()
    return (
        sum(first[index] and not second[index] for index in shared),
        sum(second[index] and not first[index] for index in shared),
        len(shared),
    )


def paired_rate(only_first: int, only_second: int, n: int) -> Rate:
    """Difference of two paired proportions with a 95 % adjusted Wald interval (Bonett and Price 2012)."""
    p, q = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Rate((only_first - only_second) / n, max(p - q - half, -1.0), min(p - q + half, 1.0))


def names(run: RunView, first: Variant, second: Variant) -> tuple[str, str, str]:
    """The labels of both networks in a run's reports, and the first one's folder name."""
    networks = ordered(run)
    return networks[first.name][1], networks[second.name][1], first.name
