"""``compact`` and ``shrink``: the small network that a pruned one is, and the smallest that keeps a guarantee."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console
from certprune.cli.options import chosen_radius, chosen_variants
from certprune.shrink_report import WITHIN

if TYPE_CHECKING:
    from rich.table import Table

    from certprune.compact import Cost


@app.command()
def compact(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/demo.")],
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="One of its variants, or 'pretrain'.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file to write; .gz compresses it. Default: in the variant's folder."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How units are bounded over [0, 1]^d: crown, or ibp. Default: crown if it is quick."),
    ] = None,
) -> None:
    """Remove what a pruned network does not need. The same outputs everywhere, from a smaller and faster network."""
    from certifiers.fingerprint import model_hash
    from certprune.compact import compact as compacted
    from certprune.compact import cost_of, write_compacted
    from certprune.runs import open_run
    from certprune.subjects import subject

    work = open_run(folder)
    chosen_variants(work.recipe, [variant], folder)
    if out is not None and out.is_dir():
        raise InputError(f"{out} is a folder, but compact writes one file. Give its name: {out / 'small.safetensors'}.")
    about = subject(work, variant)
    shape = tuple(work.stage_record("pretrain")["input_shape"])
    origin = {"run": work.recipe.name, "variant": variant, "model": model_hash(about.model), "sparsity": about.sparsity}
    found = replace(compacted(about.model, shape, method), origin=origin)
    path = out or work.folder / variant / "compacted.safetensors"
    write_compacted(found, path)
    console().print(_table(variant, cost_of(about.model, shape), cost_of(found.model, shape)))
    console().print(f"Network: {path}", soft_wrap=True)


@app.command()
def shrink(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. runs/demo; it gets more variants.")
    ],
    certified_at_least: Annotated[
        float, typer.Option(help="The certified accuracy to keep, 0 to 1, on validation images.")
    ],
    eps: Annotated[str | None, typer.Option(help="In pixel units, 0.1 or 2/255. Default: the recipe's.")] = None,
    like: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="Prune as this one does. Default: the first pruned one.")
    ] = None,
    within: Annotated[
        float, typer.Option(help="Stop once a network this many times smaller, or nearer, fails.")
    ] = WITHIN,
    count: Annotated[int | None, typer.Option(help="The first so many validation images. Default: all.")] = None,
) -> None:
    """Find the smallest network that keeps a guarantee. Tries sparsities, resumes by itself, tests the result once."""
    from certprune.data import load_data
    from certprune.progress import make_progress
    from certprune.provenance import command_line
    from certprune.runs import Run, locked, open_run
    from certprune.shrink_report import outcome, page_name, shrink_csv, shrink_page, shrink_table
    from certprune.shrinking import Search, template_of
    from certprune.stages import use_machine
    from certprune.storage import write_text

    work = open_run(folder)
    recipe = work.recipe.model_copy(update={"output": str(folder)})  # the folder may have been moved
    radius = recipe.main_eps if eps is None else chosen_radius(eps)
    if radius is None:
        raise InputError("Neither the recipe nor the command says at which eps to certify. Give --eps, e.g. --eps 0.1.")
    if count is not None and count < 1:
        raise InputError(f"--count must be at least 1, but {count} came.")
    usual = template_of(work).name
    device = use_machine(recipe)
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    progress = make_progress(console())
    with locked(folder):
        try:
            search = Search(Run(folder, recipe), data, device, radius, count, progress)
            found = search.shrink(certified_at_least, like, within)
        finally:
            progress.close()
    other = None if like in (None, usual) else like
    name = page_name(certified_at_least, radius, other, within, count)
    page = folder / f"{name}.md"
    write_text(page, shrink_page(found, command_line()))
    write_text(folder / f"{name}.csv", shrink_csv(found))
    console().print(shrink_table(found))
    console().print(outcome(found), soft_wrap=True)
    console().print(f"Report: {page}", soft_wrap=True)


def _table(title: str, before: Cost, after: Cost) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("", "before", "after", "times less"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("parameters", "nonzero", "multiply_adds", "file_bytes", "compressed_bytes"):
        was, now = getattr(before, name), getattr(after, name)
        word = {"nonzero": "not zero", "file_bytes": "bytes", "compressed_bytes": "bytes, compressed"}.get(name, name)
        table.add_row(
            word.replace("multiply_adds", "multiply-adds"), f"{was:,}", f"{now:,}", f"{was / max(now, 1):.1f}"
        )
    return table
