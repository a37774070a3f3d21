"""The README's ten lines run as they stand, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_library_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    grads = [p.grad for n, p in scope["model"].named_parameters() if n.endswith("scores")]
    assert len(grads) == 4 and all(g.abs().sum() > 0 for g in grads)
    assert "certified" in capsys.readouterr().out


def test_every_command_named_exists():
    from certprune.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"bin/certprune (\w+)", README)) | {"models", "doctor"}
    assert named <= known


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_every_file_linked_is_there(path):
    assert (Path(__file__).parent.parent / path).is_file()
