"""``certify --radius``: the largest eps certified for each image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from certifiers.errors import InputError
from certprune.cli.app import console
from certprune.cli.options import Countdown
from certprune.cli.sessions import session

if TYPE_CHECKING:
    from certprune.runs import Run


def certify_radii(
    work: Run,
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
    from certifiers.methods import method_names
    from certifiers.radius import read_radius_ledger
    from certprune.asked import asked_images
    from certprune.radii import radii_text, radius_network

    grid = work.recipe.eps_grid
    if len(largest) > 1:
        raise InputError("--radius searches up to one eps, but several came. Give --eps once, or not at all.")
    if not largest and not grid:
        raise InputError("The recipe says nothing of eps, so --radius needs to know how far to look. Give --eps 0.3.")
    up_to = largest[0] if largest else 2 * max(grid)
    options = {
        "largest": up_to,
        "tolerance": up_to / 100 if tolerance is None else tolerance,
        "methods": method_names(methods) if methods else None,
        "indices": numbers,
    }
    time_left, ledgers = Countdown(run_seconds), []
    with session(work) as here:
        for name in names:
            limits = {**options, "progress": here.progress, "run_seconds": time_left()}
            ledgers.append(radius_network(work, name, here.data, here.device, **limits))
        wanted = asked_images(work, here.data, numbers, work.recipe.certify.count).numbers
    for path in ledgers:
        rows = read_radius_ledger(path)[1]
        if rows:
            console().print(f"{path}: {len(rows)} images, {radii_text(rows, len(rows))}", soft_wrap=True)
        say_cut_short(path, (row.index for row in rows), wanted)


def say_cut_short(path: Path, decided: Iterable[int], wanted: range) -> None:
    """Say so where the ledger ``path`` lacks images that were asked for, because time ended before them."""
    from certprune.asked import shortfall

    lacking = shortfall(decided, wanted)
    if lacking:
        text = f"[yellow]Cut short:[/yellow] {path}: {lacking}; the same command goes on."
        console().print(text, soft_wrap=True)
