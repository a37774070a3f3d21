"""``certify --radius``: the largest eps certified for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from certifiers.errors import InputError
from certprune.cli.app import console


def certify_radii(
    folder: Path,
    names: Sequence[str | Path],
    methods: Sequence[str] | None,
    largest: Sequence[float],
    tolerance: float | None,
    numbers: range | None,
    run_seconds: float | None,
) -> None:
    """Radii of a run's networks into its ledgers, and one line about each.

    ``largest``: up to which eps; the recipe's largest, doubled, if there is none. ``tolerance``: a hundredth of it if
    None. ``run_seconds``: for all networks together.
    """
    import time

    from certifiers.methods import method_names
    from certifiers.radius import read_radius_ledger
    from certprune.data import load_data
    from certprune.progress import make_progress
    from certprune.radii import radii_text, radius_network
    from certprune.runs import locked, open_run
    from certprune.stages import use_machine

    work = open_run(folder)
    recipe = work.recipe
    if len(largest) > 1:
        raise InputError("--radius searches up to one eps, but several came. Give --eps once, or not at all.")
    if not largest and not recipe.eps_grid:
        raise InputError("The recipe says nothing of eps, so --radius needs to know how far to look. Give --eps 0.3.")
    up_to = largest[0] if largest else 2 * max(recipe.eps_grid)
    near = up_to / 100 if tolerance is None else tolerance
    chosen = method_names(methods) if methods else None
    device = use_machine(recipe)
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    progress, ledgers = make_progress(console()), []
    end = None if run_seconds is None else time.monotonic() + run_seconds
    with locked(work.folder):
        try:
            for name in names:
                left = None if end is None else max(end - time.monotonic(), 1e-3)
                ledgers.append(
                    radius_network(
                        work,
                        name,
                        data,
                        device,
                        largest=up_to,
                        tolerance=near,
                        methods=chosen,
                        indices=numbers,
                        progress=progress,
                        run_seconds=left,
                    )
                )
        finally:
            progress.close()
    for path in ledgers:
        rows = read_radius_ledger(path)[1]
        console().print(f"{path}: {len(rows)} images, {radii_text(rows, len(rows))}", soft_wrap=True)
