"""The ``certprune`` command. Heavy imports wait until a command needs them, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from certprune.cli import certifying, compacting, importing, looking, merging, running, smoothing, vnncomp  # noqa: F401 (commands)
from certprune.cli.app import app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, or 2 for an input error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in words:  # wherever it stands, it concerns the whole command
        words = ["--traceback", *(word for word in words if word != "--traceback")]
    app(args=words, prog_name="certprune")
