"""The verdicts of a run: which images, which network, and the ledger they are written to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from certifiers.certification import certify
from certifiers.errors import InputError
from certifiers.ledger import RowLedger
from certifiers.methods import method_names
from certifiers.threat import threat
from certifiers.verdict import Ledger, Verdict, model_hash, summarise
from certprune.asked import asked_images, begun
from certprune.data.images import ByteImages
from certprune.data.splits import Split
from certprune.progress import Progress
from certprune.runs import Run
from certprune.subjects import Subject, subject

FIRST = 100  # images whose pixels are looked at, to tell splits apart


def certify_run(run: Run, data: Any, device: torch.device, progress: Progress | None = None) -> None:
    """Certify every variant at every eps that the recipe lists; what is decided already is skipped."""
    for variant in run.recipe.variants:
        for eps in run.recipe.eps_grid:
            certify_network(run, variant.name, eps, data, device, progress=progress)


def certify_network(
    run: Run,
    network: str | Path | Subject,
    eps: float,
    data: Any,
    device: torch.device,
    *,
    methods: Sequence[str] | None = None,
    indices: range | None = None,
    progress: Progress | None = None,
    input_seconds: float | None = None,
    run_seconds: float | None = None,
) -> Path:
    """Decide images of one network at one eps; returns the ledger, whose earlier verdicts stand.

    ``network``: a variant's name, or the file of a compacted network, as :func:`certprune.subjects.subject` takes it.
    ``methods``: cheapest first (default: the recipe's; others get a ledger of their own, and so does each
    ``input_seconds``, the time an image has). ``run_seconds``: after which to stop; what is not decided by then is left
    to the next call.
    ``indices``: numbers in the recipe's split (default: the first ``count`` that the recipe asks for).
    Raises :class:`~certifiers.errors.InputError` if the network is not trained yet, or the ledger is another network's.
    """
    progress = progress or Progress()
    settings = run.recipe.certify
    methods = method_names(methods or settings.methods, limited=input_seconds is not None)
    asked = asked_images(run, data, indices, settings.count)
    about = subject(run, network)
    model = about.model.to(device)
    other = () if methods == settings.methods else methods
    path = about.ledgers / ledger_name(eps, other, input_seconds)
    split = getattr(data, settings.split)
    header = _header(run, about.name, eps, methods, data.name, model_hash(model), about.sparsity)
    limit = {} if input_seconds is None else {"input_seconds": input_seconds}
    with Ledger(path, header | {"images": images_digest(split)} | limit) as ledger:
        check_labels_held(ledger, split)
        note = begun(progress, f"{about.name} · certify eps {eps:g}", ledger, asked.numbers)
        if note is None:
            return path
        certify(
            model,
            asked.x,
            asked.y,
            threat(run.recipe.norm, eps),
            method=methods,
            attack_steps=settings.attack_steps,
            attack_restarts=settings.attack_restarts,
            batch_size=settings.batch_size,
            indices=asked.numbers,
            ledger=ledger,
            on_batch=note,
            seed=run.recipe.seed,
            input_seconds=input_seconds,
            run_seconds=run_seconds,
        )
        held = [verdict for verdict in ledger.verdicts if verdict.index in asked.numbers]
    progress.end(_outcome(held, len(asked.numbers)))
    return path


def ledger_name(eps: float, methods: Sequence[str] = (), input_seconds: float | None = None) -> str:
    """The name of a ledger at ``eps``; other methods than the recipe's, and a time limit, are in it."""
    parts = [f"eps-{eps:g}", "+".join(methods), "" if input_seconds is None else f"{input_seconds:g}s"]
    return "-".join(filter(None, parts)) + ".jsonl"


def images_digest(split: Split) -> str:
    """16 hexadecimal digits of the SHA-256 of how many images a split has, all labels, and its first 100 images.

    Which images stand in a split depends on seed and fractions, while its name does not. Labels tell, at no cost for
    the largest data set; images that stay files are not read.
    """
    pixels = split.x.pixels if isinstance(split.x, ByteImages) else split.x
    parts = [split.y.to(torch.int64), *([pixels[:FIRST]] if isinstance(pixels, torch.Tensor) else [])]
    digest = hashlib.sha256(f"{len(split.y)} images".encode())
    for part in parts:
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_labels_held(ledger: RowLedger[Any], split: Split) -> None:
    """Raise InputError unless every row of ``ledger`` has the label that the image of its number has in ``split``.

    So a ledger without a digest of its images, and one that has decided all that is asked, is not taken for another's.
    """
    labels = split.y.tolist()
    for row in ledger.verdicts:
        now = labels[row.index] if 0 <= row.index < len(labels) else None
        if row.label != now:
            found = f"there are only {len(labels)} images" if now is None else f"label {now} came with it"
            raise InputError(
                f"The ledger {ledger.path} has label {row.label} for input {row.index}, but now {found}: it is about "
                "other data, or another split of them. Ask with the run, or the seed, that it was made with, or move "
                "the file away to start anew; nothing was written."
            )


def _outcome(held: list[Verdict], asked: int) -> str:
    """What the verdicts sum up to, and how many images a time limit left for the next call."""
    left = "" if len(held) == asked else f"stopped by the time limit after {len(held)} of {asked} images"
    if not held:
        return left
    found = summarise(held)
    text = f"clean {_percent(found.clean)}, attack {_percent(found.attack)}, certified {_percent(found.certified)}"
    return f"{text}; {left}, the same command goes on" if left else text


def _header(
    run: Run, variant: str, eps: float, methods: Sequence[str], data: str, model: str, sparsity: float
) -> dict[str, Any]:
    """What the ledger's verdicts are about, and by which settings they were found."""
    settings = run.recipe.certify
    return {
        "model": model,
        "data": data,
        "split": settings.split,
        "eps": eps,
        "norm": run.recipe.norm,
        "method": "+".join(methods),
        "attack_steps": settings.attack_steps,
        "attack_restarts": settings.attack_restarts,
        "variant": variant,
        "sparsity": sparsity,
        "seed": run.recipe.seed,
    }


def _percent(accuracy: Any) -> str:
    return f"{100 * accuracy.value:.1f} %"
