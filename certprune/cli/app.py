"""The command group: options for all commands, and how mistakes and Ctrl-C end one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from certifiers.errors import InputError, SoundnessError

ORDER = (
    *("run", "demo", "import", "certify", "merge", "smooth", "compact", "shrink", "export", "verify"),
    *("report", "curve", "table", "compare", "datasets", "models", "doctor"),
)


class Commands(TyperGroup):
    """Input errors become a red paragraph and exit code 2; Ctrl-C a word on how to go on, and 130.

    Commands are listed as one needs them; what :data:`ORDER` has not comes last.
    """

    def list_commands(self, context: Any) -> list[str]:
        names = super().list_commands(context)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except (InputError, SoundnessError) as error:
            if context.params.get("traceback"):
                raise
            say_error(str(error))
            raise typer.Exit(3 if isinstance(error, SoundnessError) else 2) from None
        except OSError as error:
            if context.params.get("traceback"):
                raise
            say_error(f"{error}. Check the path, its permissions and the space left; no written file is spoilt.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if context.params.get("traceback"):
                raise
            say_error(interrupted(), title="Stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune neural networks against the robustness guarantee they must keep, and prove what they keep.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from certprune import __version__

        print(f"certprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    traceback: bool = typer.Option(False, "--traceback", help="Show where in the code an error came up."),
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
    ),
) -> None:
    """Options of every command; what they do is done in :class:`Commands` and by their callbacks."""


def say_error(message: str, title: str = "Error") -> None:
    """One red paragraph on standard error, nothing else there."""
    from rich.console import Console
    from rich.text import Text

    # Soft wrap: the message stays one line in a log file, and paths in it can be copied whole.
    Console(stderr=True).print(Text(f"{title}: {message}", style="red"), soft_wrap=True)


def interrupted() -> str:
    """How to go on after Ctrl-C."""
    from certprune.provenance import command_line

    return f"nothing is lost but the epoch or batch in hand. Go on with:  {command_line()}"


def console() -> Any:
    """Where commands print."""
    from rich.console import Console

    return Console(highlight=False)
