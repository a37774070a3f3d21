"""A run's certificates by randomized smoothing: which images, which network, and the ledger they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from certifiers.fingerprint import model_hash
from certifiers.smoothing import (
    SmoothedClassifier,
    SmoothedLedger,
    certified_accuracy,
    certify_smoothed,
    smoothing_header,
)
from certprune.asked import asked_images, begun
from certprune.certifying import check_labels_held, images_digest
from certprune.config import SmoothingSettings
from certprune.progress import Progress
from certprune.runs import Run


def smooth_run(run: Run, data: Any, device: torch.device, progress: Progress | None = None) -> None:
    """Certify every variant as the recipe's ``certify.smoothing`` says, if it does; skips what is decided already."""
    settings = run.recipe.certify.smoothing
    if settings is None:
        return
    for variant in run.recipe.variants:
        smooth_network(run, variant.name, settings, data, device, progress=progress)


def smooth_network(
    run: Run,
    variant: str,
    settings: SmoothingSettings,
    data: Any,
    device: torch.device,
    *,
    indices: range | None = None,
    progress: Progress | None = None,
) -> Path:
    """Certify images of one network by smoothing; returns the ledger, whose earlier verdicts stand.

    ``settings`` has a sigma. ``indices``: numbers in the recipe's split (default: the first ``settings.count``).
    Raises :class:`~certifiers.errors.InputError` if the network is not trained yet, or the ledger is of another network
    or other settings.
    """
    progress = progress or Progress()
    recipe = run.recipe
    asked = asked_images(run, data, indices, settings.count)
    stage = "pretrain" if variant == "pretrain" else "finetune"
    record = run.stage_record(stage, variant)
    model = run.load_model(variant, stage).to(device)
    classifier = SmoothedClassifier(model, record["classes"], settings.sigma, settings.noise, settings.shared_noise)
    path, split = smoothing_path(run, variant, settings), getattr(data, recipe.certify.split)
    header = {
        "model": model_hash(model),
        "data": data.name,
        "split": recipe.certify.split,
        "images": images_digest(split),
        **smoothing_header(classifier, settings.stopping, asked.x),
        **{key: getattr(settings, key) for key in ("sigma", "n0", "n", "alpha")},
        "seed": recipe.seed,
        "pixels": asked.x[0].numel(),
        "variant": variant,
        "sparsity": record["sparsity"]["total"],
    }
    with SmoothedLedger(path, header) as ledger:
        check_labels_held(ledger, split)
        note = begun(progress, f"{variant} · smooth sigma {settings.sigma:g}", ledger, asked.numbers)
        if note is None:
            return path
        verdicts = certify_smoothed(
            classifier,
            asked.x,
            asked.y,
            n0=settings.n0,
            n=settings.n,
            alpha=settings.alpha,
            stopping=settings.stopping,
            seed=recipe.seed,
            indices=asked.numbers,
            batch_size=settings.batch_size,
            ledger=ledger,
            on_input=note,
        )
    progress.end(f"certified {radii_text(verdicts, settings.radii)}{samples_text(verdicts, settings)}")
    return path


def smoothing_path(run: Run, variant: str, settings: SmoothingSettings) -> Path:
    """The ledger of ``variant`` at ``settings.sigma``; other settings than the recipe's are in its name."""
    usual = run.recipe.certify.smoothing or SmoothingSettings()
    name = f"smoothing-{settings.sigma:g}"
    for key in ("n0", "n", "alpha", "noise", "tolerance", "up_to", "decide", "shared_noise"):
        value = getattr(settings, key)
        if value != getattr(usual, key):
            words = "+".join(f"{radius:g}" for radius in value) if key == "decide" else str(value).lower()
            name += f"-{key.replace('_', '')}={words or 'none'}"
    return run.folder / "certificates" / variant / f"{name}.jsonl"


def samples_text(verdicts: list[Any], settings: SmoothingSettings) -> str:
    """Where sampling may stop early, how many samples were drawn: ``", 1,234 samples an image"``; else nothing."""
    if settings.stopping is None:
        return ""
    used = [settings.n if verdict.samples is None else verdict.samples for verdict in verdicts]
    return f", {sum(used) / len(used):,.0f} samples an image"


def radii_text(verdicts: list[Any], radii: tuple[float, ...]) -> str:
    """What the verdicts sum up to: ``"84.2 % at r 0, 71.0 % at r 0.25"``."""
    found = ((radius, certified_accuracy(verdicts, radius)) for radius in radii)
    return ", ".join(f"{100 * accuracy.value:.1f} % at r {radius:g}" for radius, accuracy in found)
