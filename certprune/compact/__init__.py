"""Smaller networks that compute the same: what a mask leaves idle is removed, not only zeroed.

``compact`` takes a plain sparse network and returns a plain dense one that equals it on the whole domain [0, 1]^d;
``write_compacted`` and ``load_compacted`` keep it in one file, without pickle.
"""

from certprune.compact.compaction import METHODS, Compacted, compact
from certprune.compact.cost import Cost, cost_of
from certprune.compact.files import is_compacted, load_compacted, read_compacted, write_compacted
from certprune.compact.semi_structured import semi_structured

__all__ = [
    "METHODS",
    "Compacted",
    "Cost",
    "compact",
    "cost_of",
    "is_compacted",
    "load_compacted",
    "read_compacted",
    "semi_structured",
    "write_compacted",
]
