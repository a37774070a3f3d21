"""``compact``: the small network that a pruned one really is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifiers.errors import InputError
from certprune.cli.app import app, console
from certprune.cli.options import chosen_variants

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
        str, typer.Option(help="How units are bounded over [0, 1]^d: crown, or ibp for very large networks.")
    ] = "crown",
) -> None:
    """Remove what a pruned network does not need: the same outputs everywhere, from a smaller and faster network."""
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
