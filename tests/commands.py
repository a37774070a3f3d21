"""The command line in tests: commands run in this process, and a small finished run to try them on.

The fixtures ``cli`` and ``work`` (conftest.py) use these; ``work`` copies what a test file's own ``finished`` makes.
"""

import shutil
from pathlib import Path

import pytest

from certprune.cli import main

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
VARIANT = "score-erk-0.8"
VARIANTS = (VARIANT, "magnitude-erk-0.8")
ONE_EPOCH = ("pretrain.epochs=1", "prune.epochs=1", "finetune.epochs=1")
NOISY = ("objective={name: gaussian, sigma: 0.25}", "certify.eps=null")


class Cli:
    """Runs commands; keeps the output and the errors of the last one, and returns its exit code."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *words):
        self.capsys.readouterr()
        code = ended(*words)
        self.out, self.err = self.capsys.readouterr()
        return code

    def refuses(self, *words, saying=()):
        """The command ends with code 2 and one paragraph that holds all of ``saying``."""
        assert self(*words) == 2, (self.out, self.err)
        assert self.err.startswith("Error: ") and "Traceback (most" not in self.err
        assert "\n\n" not in self.err.strip(), "one paragraph"
        for word in saying:
            assert word in self.err, self.err


def ended(*words):
    """Run a command; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


def smoke_run(folder, *settings):
    """A run of the smoke recipe with these settings, made in ``folder``."""
    assert ended("run", SMOKE, *settings, f"output={folder}") == 0
    return folder


def copied_run(finished, folder):
    """A copy of a finished run, as if it had been made where it is."""
    folder = Path(shutil.copytree(finished, folder))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"output: {finished}", f"output: {folder}"))
    return folder


def ledger_path(folder, name, variant=VARIANT):
    """A run's ledger by its name without the ending, e.g. ``eps-0.05``."""
    return folder / "certificates" / variant / f"{name}.jsonl"
