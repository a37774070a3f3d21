"""What several commands' options mean: which networks of a run, which images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from certifiers.errors import InputError

if TYPE_CHECKING:
    from certprune.config import Recipe


def chosen_variants(recipe: Recipe, variants: Sequence[str] | None, folder: Path) -> list[str]:
    """The names that ``--variant`` gave, else all of the recipe; InputError for one that the run has not."""
    names = list(variants or ()) or [known.name for known in recipe.variants]
    for name in names:
        if name != "pretrain" and recipe.variant(name) is None:
            known = ", ".join(["pretrain", *(v.name for v in recipe.variants)])
            raise InputError(f"The run {folder} has no variant {name!r}. It has: {known}.")
    return names


def chosen_images(index: str | None, count: int | None) -> range | None:
    """The images that ``--index A:B`` or ``--count N`` gave; None for neither, InputError for both or a bad one."""
    if index is not None and count is not None:
        raise InputError("--index and --count both say which images to certify. Give one of them.")
    if count is not None:
        if count < 1:
            raise InputError(f"--count must be at least 1, but {count} came.")
        return range(count)
    if index is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", index)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--index must be A:B with A below B, e.g. 0:100, but {index!r} came.")
    return range(int(match[1]), int(match[2]))
