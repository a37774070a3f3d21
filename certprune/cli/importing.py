"""``import``: a run out of a checkpoint from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="Of HYDRA, with torch.nn.utils.prune's masks, or a plain state dict.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder to make, e.g. runs/hydra_vgg16.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the run's recipe, e.g. model.mean=0.5 model.std=0.5"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The network's name (certprune models). Default: what the file says.")
    ] = None,
    data: Annotated[str, typer.Option(help="The data set to certify on (certprune datasets).")] = "cifar10",
    keep: Annotated[
        float | None, typer.Option(help="HYDRA's k, the fraction of weights kept, where the file has scores.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of an image. Default: the data set's, where its name says it.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="How many there are. Default: as above.")] = None,
) -> None:
    """Make a run of a network from elsewhere. It can be certified, smoothed, compacted; trains nothing."""
    from certprune.exchange.importing import NAME, import_run
    from certprune.provenance import command_line

    images = None if shape is None else _shape(shape)
    run = import_run(checkpoint, out, model, data, keep, images, classes, settings or (), command_line())
    found = run.stage_record("finetune", NAME)["sparsity"]
    text = f"{run.folder}: {run.recipe.model.name}, {found['kept']:,} of {found['weights']:,} weights are not zero"
    console().print(text, soft_wrap=True)
    console().print(f"Certify it:  certprune certify {run.folder} --eps 2/255 --count 100", soft_wrap=True)


def _shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+),(\d+),(\d+)", text)
    if match is None:
        raise InputError(f"--shape must be C,H,W, e.g. 3,32,32, but {text!r} came.")
    return int(match[1]), int(match[2]), int(match[3])
