"""What is pruned: criteria rank weights, budgets say how many a layer keeps, patterns where, schedules when."""

from certprune.pruning.budgets import BUDGETS, Budget, kept_counts
from certprune.pruning.criteria import CRITERIA, Criterion
from certprune.pruning.gradients import weight_gradients
from certprune.pruning.layers import prunable_layers, select_layers
from certprune.pruning.patterns import pattern_of
from certprune.pruning.plan import Pruning
from certprune.pruning.schedules import SCHEDULES

__all__ = [
    "BUDGETS",
    "CRITERIA",
    "SCHEDULES",
    "Budget",
    "Criterion",
    "Pruning",
    "kept_counts",
    "pattern_of",
    "prunable_layers",
    "select_layers",
    "weight_gradients",
]
