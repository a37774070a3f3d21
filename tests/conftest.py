"""What every test shares: fixed seeds, and one thread, so that nothing depends on the machine's cores."""

import random
import sys

import numpy
import pytest
import torch

from tests.commands import Cli, copied_run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Runs commands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["certprune"])
    return Cli(capsys)


@pytest.fixture
def work(finished, tmp_path):
    """A copy of the run that the test file's fixture ``finished`` made, to be worked on."""
    return copied_run(finished, tmp_path / finished.name)
