"""``merge``: ledgers of one certification that was shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from certprune.cli.app import app, console


@app.command()
def merge(
    ledgers: Annotated[
        list[Path], typer.Argument(metavar="LEDGER...", help="Shards of one certification: --index parts of it.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The ledger to write; it must not exist yet.")],
) -> None:
    """Put ledgers of one certification together. Several machines made them, each of a part of the images."""
    from certifiers.merging import merge_ledgers

    rows = merge_ledgers(ledgers, out)
    console().print(f"{out}: {len(rows)} images of {len(ledgers)} ledgers", soft_wrap=True)
