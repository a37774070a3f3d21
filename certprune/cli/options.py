"""What several commands' options mean: which networks of a run, which images."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from certifiers.errors import InputError

if TYPE_CHECKING:
    from certprune.config import Recipe


def chosen_variants(recipe: Recipe, variants: Sequence[str] | None, folder: Path) -> list[str]:
    """The names that ``--variant`` gave, else all of the recipe; InputError for one that the run has not."""
    names = list(variants or ()) or [known.name for known in recipe.variants]
    for name in names:
        if name != "pretrain" and recipe.variant(name) is None:
            known = ", ".join(["pretrain", *(v.name for v in recipe.variants)])
            raise InputError(f"The run {folder} has no variant {name!r}. It has: {known}.")
    return names


def chosen_images(index: str | None, count: int | None) -> range | None:
    """The images that ``--index A:B`` or ``--count N`` gave; None for neither, InputError for both or a bad one."""
    if index is not None and count is not None:
        raise InputError("--index and --count both say which images to certify. Give one of them.")
    if count is not None:
        if count < 1:
            raise InputError(f"--count must be at least 1, but {count} came.")
        return range(count)
    if index is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", index)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--index must be A:B with A below B, e.g. 0:100, but {index!r} came.")
    return range(int(match[1]), int(match[2]))


def chosen_radius(text: str) -> float:
    """The radius that ``--eps`` gave, as a number or a fraction; InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*(?:/\s*([0-9.]+))?\s*", text)
    try:
        value = float(match[1]) / float(match[2] or 1) if match else -1.0
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"--eps must be a number of at least 0, like 0.1 or 2/255, but {text!r} came.")
    return value


def check_timeout(seconds: float, option: str = "--timeout") -> None:
    """InputError unless what the option gave is a number of seconds above 0."""
    if not 0 < seconds < float("inf"):
        raise InputError(f"{option} must be a number of seconds above 0, but {seconds} came.")


def check_external(command: str, timeout: float) -> None:
    """InputError unless the command of an external verifier can be filled in, and the extra it needs is there."""
    from certifiers.vnncomp.external import command_words
    from certifiers.vnncomp.extras import need

    check_timeout(timeout, "--external-timeout")
    command_words(command)
    need("onnx")
    need("onnxruntime")


def check_limits(radius: bool, tolerance: float | None, **seconds: float | None) -> None:
    """InputError for a time limit that is not above 0, and for options that go with or without ``--radius`` only."""
    for name, value in seconds.items():
        if value is not None:
            check_timeout(value, f"--{name.replace('_', '-')}")
    if tolerance is not None and not radius:
        raise InputError("--tolerance says how near --radius gets. Give --radius too, or leave it out.")
    if radius and seconds.get("input_seconds") is not None:
        raise InputError(
            "--radius has no time limit for single images. Leave --input-seconds out; --run-seconds works."
        )


class Countdown:
    """What is left of a time limit, in seconds, whenever it is called; None where there is none."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def __call__(self) -> float | None:
        return None if self.end is None else max(self.end - time.monotonic(), 1e-3)
