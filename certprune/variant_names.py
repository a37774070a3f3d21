"""What a variant is called where its recipe gives it no name, and how it differs from the usual in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USUAL = {"schedule": "one_shot", "pattern": "unstructured", "floor": None}


def default_name(plan: Mapping[str, Any]) -> str:
    """The folder name of the variant that `plan` describes, with the schema's defaults for what it leaves out."""
    objective = (plan.get("objective") or {}).get("name")
    against = f"-{objective}" if objective else ""
    if plan.get("dense"):
        return f"dense{against}"
    ways = f"{plan.get('criterion', 'score')}{against}-{plan.get('budget', 'erk')}-{plan.get('sparsity', 0.95):g}"
    return "-".join([ways, *(word.replace(":", "of").replace(" ", "") for word in unusual(plan))])


def unusual(plan: Mapping[str, Any]) -> list[str]:
    """How a pruned variant differs from one shot, no pattern and no floor: ["gradual", "2:4", "floor 8"]."""
    chosen = {**USUAL, **plan}
    words = [str(chosen[key]) for key in ("schedule", "pattern") if chosen[key] != USUAL[key]]
    return words + ([f"floor {chosen['floor']:g}"] if chosen["floor"] is not None else [])
