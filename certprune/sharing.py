"""Certification by several processes: each decides its part of the images, and the leader puts the ledgers together.

A process works in a folder of its own below ``.shards``: links to the run's networks, and copies of its ledgers, so
that what is decided already is decided for all. Verdicts do not depend on how many processes there are, since attacks
and noise are seeded by image. If the run is killed the shards stay, and the next start takes them in first.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from certifiers.merging import merge_ledgers
from certprune.certifying import certify_network, certify_run
from certprune.parallel import World
from certprune.progress import Progress
from certprune.runs import Run
from certprune.smoothing import smooth_network, smooth_run

SHARDS = ".shards"
LEDGERS = "certificates"


def certify_together(run: Run, data: Any, device: torch.device, among: World, progress: Progress | None = None) -> None:
    """All that the recipe certifies, bounds and smoothing, shared out among the processes of ``among``.

    When it returns, in every process, the run's ledgers are whole. Raises what certification and merging raise.
    """
    if among.size == 1:
        _collect(run.folder)
        certify_run(run, data, device, progress)
        return smooth_run(run, data, device, progress)
    if among.leads:
        _collect(run.folder)
    among.wait()
    own = Run(_shard(run.folder, among.rank), run.recipe)
    settings, available = run.recipe.certify, len(getattr(data, run.recipe.certify.split).y)
    for variant in run.recipe.variants:
        for eps in run.recipe.eps_grid:
            part = _part(among, settings.count, available)
            if part:
                certify_network(own, variant.name, eps, data, device, indices=part, progress=progress)
        part = _part(among, settings.smoothing.count, available) if settings.smoothing else None
        if part:
            smooth_network(own, variant.name, settings.smoothing, data, device, indices=part, progress=progress)
    among.wait()
    if among.leads:
        _collect(run.folder)
    among.wait()


def _part(among: World, count: int | None, available: int) -> range:
    """This process's images, of the first ``count``."""
    total = min(count or available, available)
    return range(total * among.rank // among.size, total * (among.rank + 1) // among.size)


def _shard(folder: Path, rank: int) -> Path:
    """A process's own view of the run: its networks, and copies of its ledgers."""
    own = folder / SHARDS / str(rank)
    own.mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.name == LEDGERS:
            shutil.copytree(entry, own / "copying")
            os.replace(own / "copying", own / LEDGERS)  # a kill leaves no half of a ledger there
        elif entry.name != SHARDS:
            os.symlink(entry.resolve(), own / entry.name)
    return own


def _collect(folder: Path) -> None:
    """Take the rows of all shards into the run's own ledgers, and remove the shards."""
    if not (folder / SHARDS).exists():
        return
    shards = [shard / LEDGERS for shard in sorted((folder / SHARDS).iterdir())]
    names = sorted({path.relative_to(shard) for shard in shards for path in shard.rglob("*.jsonl")})
    for name in names:
        found = [shard / name for shard in (folder / LEDGERS, *shards) if (shard / name).exists()]
        whole = folder / LEDGERS / name
        whole.parent.mkdir(parents=True, exist_ok=True)
        if len(found) == 1:
            if found[0] != whole:
                os.replace(found[0], whole)
            continue
        merged = whole.with_suffix(".merged")
        merged.unlink(missing_ok=True)
        merge_ledgers(found, merged)
        os.replace(merged, whole)
    shutil.rmtree(folder / SHARDS)
