"""Which images a page's figures are of, in words: only test images are used for nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from certprune.reports.read import RunView

REUSED = {
    "validation": "The validation images also chose the epoch of each network",
    "train": "The training images are those that the networks were trained on",
}


def splits_of(runs: Sequence[RunView]) -> list[str]:
    """The splits whose images were certified, as the ledgers' headers say; "test" where there is no ledger."""
    ledgers = (
        ledger
        for run in runs
        for variant in run.variants
        for ledger in (*variant.ledgers, *variant.others, *variant.radii, *variant.smoothed)
    )
    return list(dict.fromkeys(str(ledger.header.get("split") or "test") for ledger in ledgers)) or ["test"]


def images_of(splits: Sequence[str]) -> str:
    """What to call the images that were certified: "test images"."""
    return f"{' and '.join('training' if split == 'train' else split for split in splits)} images"


def reuse(splits: Sequence[str]) -> str:
    """What else the images were used for, and what follows; "" for test images."""
    seen = [REUSED[split] for split in splits if split in REUSED]
    return f"{'. '.join(seen)}, so that figures of them flatter the networks." if seen else ""
