"""``export`` and ``verify``: networks and properties in the forms of the verification competition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console
from certprune.cli.options import check_timeout, chosen_images, chosen_radius, chosen_variants
from certprune.cli.sessions import recipe_data

if TYPE_CHECKING:
    from certprune.runs import Run

FORMATS = ("vnncomp",)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/demo.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write onnx/, vnnlib/ and instances.csv.")],
    format: Annotated[str, typer.Option(help="What to write; vnncomp is the only one.")] = "vnncomp",
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat for several; 'pretrain' too. Default: the recipe's variants."),
    ] = None,
    network: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A compacted network instead; repeat for several.")
    ] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(metavar="EPS", help="In pixel units, 0.1 or 2/255; repeat for several. Default: the recipe's."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each instance, as instances.csv says.")] = 60.0,
    index: Annotated[str | None, typer.Option(metavar="A:B", help="Images A to B - 1 of the split.")] = None,
    count: Annotated[int | None, typer.Option(help="The first so many images of the split.")] = None,
) -> None:
    """Write networks as ONNX, robustness of images as VNN-LIB. Other verifiers read them."""
    from certifiers.threat import threat
    from certifiers.vnncomp.instances import OPSET, eps_text, write_instances
    from certprune.asked import asked_images
    from certprune.runs import open_run
    from certprune.subjects import chosen_networks, subject

    if format not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, but {format!r} came.")
    check_timeout(timeout)
    work = open_run(folder)
    recipe = work.recipe
    names = chosen_variants(recipe, variant, folder)
    radii = [chosen_radius(text) for text in eps] if eps else list(recipe.eps_grid)
    if not radii:
        raise InputError("Neither the recipe nor the command says which eps to export. Give --eps, e.g. --eps 0.1.")
    asked = asked_images(work, recipe_data(recipe), chosen_images(index, count), recipe.certify.count)
    networks = list(dict.fromkeys(chosen_networks(names, network, variant)))
    _check_names_differ(work, networks)
    for chosen in networks:
        about = subject(work, chosen)
        name, model = about.name, about.model
        for radius in radii:
            lines = write_instances(
                model,
                asked.x,
                asked.y,
                threat(recipe.norm, radius),
                out,
                name=name,
                timeout=timeout,
                indices=asked.numbers,
            )
            console().print(
                f"{out / 'onnx' / name}.onnx (opset {OPSET}): {len(lines)} properties at eps {eps_text(radius)}; "
                f"{len(asked.y) - len(lines)} images are predicted wrong and have none",
                soft_wrap=True,
            )
    console().print(f"Instances: {out / 'instances.csv'}", soft_wrap=True)


def _check_names_differ(work: Run, networks: Sequence[str | Path]) -> None:
    """Raise InputError where two of the networks would be written to one file."""
    from certprune.subjects import subject

    files: dict[str, Path] = {}
    for path in (chosen for chosen in networks if isinstance(chosen, Path)):
        name = subject(work, path).name
        if name in files:
            raise InputError(
                f"{files[name]} and {path} are both called {name}, by which a network is exported. Nothing was "
                "written. Export them to different folders, or rename one of the files."
            )
        files[name] = path


@app.command()
def verify(
    network: Annotated[Path, typer.Argument(metavar="NET.onnx", help="A feed-forward ReLU network.")],
    question: Annotated[Path, typer.Argument(metavar="PROP.vnnlib[.gz]", help="What is asked about it.")],
    timeout: Annotated[float, typer.Option(help="Seconds to search; a stage in hand is finished.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the attack's random starts.")] = 0,
) -> None:
    """Decide a VNN-LIB property of an ONNX network. Prints unsat, sat and a counterexample, unknown or timeout."""
    from certifiers.vnncomp import read_network, read_property, verify, witness_text

    check_timeout(timeout)
    answer = verify(read_network(network), read_property(question), timeout, seed=seed)
    typer.echo(answer.verdict)
    if answer.witness is not None:
        typer.echo(witness_text(answer.witness))
    typer.echo(f"{answer.method}, {answer.seconds:.2f} s", err=True)
