"""What is pruned: criteria rank the weights of a layer, budgets say how many of them it keeps."""

from certprune.pruning.budgets import BUDGETS, kept_counts
from certprune.pruning.criteria import CRITERIA, Criterion
from certprune.pruning.layers import prunable_layers, select_layers

__all__ = ["BUDGETS", "CRITERIA", "Criterion", "kept_counts", "prunable_layers", "select_layers"]
