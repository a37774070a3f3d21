"""What is to be pruned and how, and what follows from it for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from certifiers.errors import InputError
from certprune.pruning.budgets import BUDGETS, Budget, checked_sparsity, kept_counts
from certprune.pruning.criteria import CRITERIA, Criterion, layer_adaptive
from certprune.pruning.patterns import Pattern, pattern_of
from certprune.registry import look_up


@dataclass(frozen=True)
class Pruning:
    """One network's pruning: `sparsity` of its weights go, which ones by `criterion`, how many a layer by `budget`.

    `floor`: what each layer keeps at least (see :func:`~certprune.pruning.budgets.kept_counts`); `pattern`: where
    the kept ones may lie (see :mod:`certprune.pruning.patterns`); only random criteria use `seed`. Raises InputError
    for what is unknown, and for combinations that mean nothing.
    """

    sparsity: float = 0.99
    criterion: str = "score"
    budget: str = "uniform"
    floor: float | int | None = None
    pattern: str = "unstructured"
    seed: int = 0

    def __post_init__(self):
        checked_sparsity(self.sparsity)
        look_up("criterion", self.criterion, CRITERIA)
        look_up("budget", self.budget, BUDGETS)
        pattern_of(self.pattern)
        if BUDGETS[self.budget].learned and not self.rank.trained:
            trained = ", ".join(name for name, each in CRITERIA.items() if each.trained)
            raise InputError(
                f"The budget {self.budget!r} is trained along with scores, but the criterion {self.criterion!r} trains "
                f"none. Use a criterion that does ({trained}), or the budget 'global'."
            )

    @property
    def rank(self) -> Criterion:
        return CRITERIA[self.criterion]

    @property
    def share(self) -> Budget:
        return BUDGETS[self.budget]

    @property
    def where(self) -> Pattern:
        return pattern_of(self.pattern)

    def counts(
        self,
        scores: Sequence[torch.Tensor],
        sparsity: float | None = None,
        offsets: Sequence[torch.Tensor] | None = None,
    ) -> list[int]:
        """The weights that each layer keeps, by its scores, at `sparsity` (None: the final one).

        Where a budget compares layers: trained scores as they are, since they start scaled by fan-in and all descend
        the same loss; scores in the loss's units as they are; others made layer-adaptive. Plus the learned `offsets`.

        On the way to the final sparsity a layer may keep more than its pattern allows; InputError if it must do so in
        the end, or if the budget cannot be met.
        """
        pattern, shapes = self.where, [score.shape for score in scores]
        caps = [pattern.cap(shape) for shape in shapes]
        present = self.sparsity if sparsity is None else sparsity
        free = present < self.sparsity and (1 - present) * sum(map(math.prod, shapes)) > sum(caps) - len(caps)
        compared = None
        if self.share.by_scores:
            compared = [
                score if self.rank.trained or self.rank.in_loss_units else layer_adaptive(score) for score in scores
            ]
            if offsets is not None:
                compared = [score + offset for score, offset in zip(compared, offsets, strict=True)]
            compared = compared if free else [pattern.ranked(score) for score in compared]
        counts = kept_counts(self.budget, shapes, present, self.floor, None if free else caps, compared)
        return [pattern.whole(count, shape) for count, shape in zip(counts, shapes, strict=True)]
