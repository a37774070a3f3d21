"""What every command sets up that works on the networks of a run: the machine, the data, progress, the lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certprune.cli.app import console

if TYPE_CHECKING:
    import torch

    from certprune.config import Recipe
    from certprune.progress import Progress
    from certprune.runs import Run


@dataclass(frozen=True)
class Session:
    """``work`` is the run, ``screen`` where it is told of."""

    work: Run
    data: Any
    device: torch.device
    progress: Progress
    screen: Any


def recipe_data(recipe: Recipe) -> Any:
    """The data set of a recipe, split as it says."""
    from certprune.data import load_data

    return load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)


@contextmanager
def session(work: Run) -> Iterator[Session]:
    """All of it for one command; the run is locked, and the progress shown, until the block ends."""
    from certprune.progress import make_progress
    from certprune.runs import locked
    from certprune.stages import use_machine

    device, data = use_machine(work.recipe), recipe_data(work.recipe)
    screen = console()
    progress = make_progress(screen)
    with locked(work.folder):
        try:
            yield Session(work, data, device, progress, screen)
        finally:
            progress.close()
