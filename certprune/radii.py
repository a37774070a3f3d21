"""A run's certified radii: which images, which network, and the ledger they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from certifiers.fingerprint import model_hash
from certifiers.radius import RADIUS_METHODS, USUAL, RadiusLedger, RadiusVerdict, certify_radii
from certifiers.verdict import Accuracy, Status
from certprune.asked import asked_images, begun
from certprune.certifying import check_labels_held, images_digest
from certprune.progress import Progress
from certprune.runs import Run
from certprune.subjects import Subject, subject

PREFIX = "radius-"


def radius_network(
    run: Run,
    network: str | Path | Subject,
    data: Any,
    device: torch.device,
    *,
    largest: float,
    tolerance: float,
    methods: Sequence[str] | None = None,
    indices: range | None = None,
    progress: Progress | None = None,
    run_seconds: float | None = None,
) -> Path:
    """Find the largest eps certified for images of one network; returns the ledger, whose earlier rows stand.

    ``methods``: cheapest first (default: those of the recipe that can). ``indices``: numbers in the recipe's split
    (default: the first ``count`` that the recipe asks for). Raises :class:`~certifiers.errors.InputError` if the
    network is not trained yet, or the ledger is of another network or other settings.
    """
    progress = progress or Progress()
    recipe, settings = run.recipe, run.recipe.certify
    usual = tuple(name for name in settings.methods if name in RADIUS_METHODS) or USUAL
    methods = tuple(methods or usual)
    asked = asked_images(run, data, indices, settings.count)
    about = subject(run, network)
    model = about.model.to(device)
    split = getattr(data, settings.split)
    path = about.ledgers / radius_name(largest, tolerance, () if methods == usual else methods)
    header = {
        "model": model_hash(model),
        "data": data.name,
        "split": settings.split,
        "images": images_digest(split),
        "norm": recipe.norm,
        "method": "+".join(methods),
        "largest": largest,
        "tolerance": tolerance,
        "attack_steps": settings.attack_steps,
        "attack_restarts": settings.attack_restarts,
        "variant": about.name,
        "sparsity": about.sparsity,
        "seed": recipe.seed,
    }
    with RadiusLedger(path, header) as ledger:
        check_labels_held(ledger, split)
        note = begun(progress, f"{about.name} · radius up to {largest:g}", ledger, asked.numbers)
        if note is None:
            return path
        found = certify_radii(
            model,
            asked.x,
            asked.y,
            recipe.norm,
            methods,
            largest=largest,
            tolerance=tolerance,
            attack_steps=settings.attack_steps,
            attack_restarts=settings.attack_restarts,
            batch_size=settings.batch_size,
            indices=asked.numbers,
            ledger=ledger,
            on_batch=note,
            seed=recipe.seed,
            run_seconds=run_seconds,
        )
    progress.end(radii_text(found, len(asked.numbers)))
    return path


def radius_name(largest: float, tolerance: float, methods: Sequence[str] = ()) -> str:
    """The name of a ledger for radii up to ``largest``; other methods than the recipe's are in it."""
    return f"{PREFIX}{largest:g}-{tolerance:g}" + (f"-{'+'.join(methods)}" if methods else "") + ".jsonl"


def radii_text(found: Sequence[RadiusVerdict], asked: int) -> str:
    """What the radii sum up to: ``"certified 81.0 % at eps > 0, half of the images at eps 0.08"``, and what is left."""
    if not found:
        return f"stopped by the time limit before the first of {asked} images; the same command goes on"
    held = Accuracy(sum(row.status is Status.certified for row in found), len(found))
    radii = sorted((row.radius for row in found), reverse=True)
    text = f"certified {100 * held.value:.1f} %, half of the images up to eps {rounded_down(radii[len(radii) // 2])}"
    if len(found) < asked:
        text += f"; stopped by the time limit after {len(found)} of {asked} images, the same command goes on"
    return text


def rounded_down(radius: float, digits: int = 4) -> str:
    """A radius as text that claims no more than was certified."""
    return f"{int(radius * 10**digits) / 10**digits:.{digits}f}"
