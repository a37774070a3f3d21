"""The pages of docs/ as things that run: their blocks, their commands, and whether what they show is what comes out.

A ``console`` block is a session: lines after ``$`` are commands, the others what they print, trimmed to what matters.
A shown line must come out, in that order, whatever its numbers are; … stands for anything in a line, or for lines.
A ``yaml`` block that begins with ``# NAME.yaml`` is that file; a ``python`` block goes on where the last one ended.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.commands import ROOT, ended

PAGES = sorted((ROOT / "docs").glob("*.md"))
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_RULE = re.compile(r"[─━┏┓┡┩┃│└┘┴┳╇┬├┤═]+")


@dataclass(frozen=True)
class Block:
    """``kind`` is what stands behind the opening fence."""

    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*one) for one in found]


def sessions(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is said to print."""
    command, shown = None, []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, shown
            command, shown = line[2:], []
        elif line.strip():
            shown.append(line)
    if command is not None:
        yield command, shown


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of certprune in a page's blocks, those that are only shown too, without its name."""
    for block in blocks(page):
        if block.kind == "console":
            lines = [command for command, _ in sessions(block.text)]
        elif block.kind in ("", "sh"):
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
        else:
            continue
        for line in lines:
            words = shlex.split(line, comments=True)
            names = [place for place, word in enumerate(words) if Path(word).name in ("certprune", "run.py")]
            if names:
                yield words[names[0] + 1 :]


def run_command(command: str) -> str:
    """Run one command of a session here; what it prints. Fails if it ends with an error that it does not say."""
    words = shlex.split(command, comments=True)
    if words[0] != "certprune":
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        return ran.stdout + ran.stderr
    words = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    out, argv = io.StringIO(), sys.argv
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = ended(*words[1:])
    finally:
        sys.argv = argv
    assert code == (2 if "Error: " in out.getvalue() else 0), out.getvalue()
    return out.getvalue()


def missing(shown: list[str], printed: str) -> str | None:
    """The first shown line that was not printed after those before it; None if all were."""
    rest = iter([_plain(line) for line in printed.splitlines()])
    for line in shown:
        pattern = ".*".join(re.escape(part.strip()) for part in _plain(line).split("…"))
        if pattern.strip(".*") and not any(re.fullmatch(pattern, one) for one in rest):
            return line
    return None


def _plain(line: str) -> str:
    return " ".join(_NUMBER.sub("", _RULE.sub(" ", line)).split())  # a cell with a number may be empty elsewhere


def run_page(page: Path) -> list[str]:
    """Run all blocks of a page in this folder; every line that it shows and that was not printed."""
    scope: dict = {}
    wrong = []
    for block in blocks(page):
        name = re.match(r"# (\w+\.(?:yaml|py))\n", block.text)
        if name:
            Path(name[1]).write_text(block.text)
        elif block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, page.name, "exec"), scope)
        elif block.kind == "console":
            for command, shown in sessions(block.text):
                printed = run_command(command)
                line = missing(shown, printed)
                if line is not None:
                    wrong.append(f"{page.name}: $ {command}\nshould print\n{line}\nbut prints\n{printed}")
    return wrong
