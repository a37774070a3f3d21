"""Figures for TensorBoard: every epoch of every stage, and an error that names the extra where it is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from certifiers.errors import InputError
from certprune.cli import app
from certprune.progress import Progress
from certprune.storage import read_json
from certprune.tensorboard import TensorBoard

SMOKE = str(Path(__file__).parent.parent / "configs" / "smoke.yaml")
ROW = {
    "epoch": 1,
    "step": 7,
    "lr": 0.1,
    "train": {"loss": 2.0},
    "validation": {"loss": 3, "clean_accuracy": None},
    "seconds": 1.5,
    "selected": True,
}


class Writer:
    """Stands in for torch's SummaryWriter."""

    made: list[Writer] = []

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = Path(folder), [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        assert not self.closed
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    Writer.made = []
    return Writer.made


def test_rows_become_scalars(writers, tmp_path):
    seen = []
    shown = type(
        "Shown", (Progress,), {"epoch": lambda self, *a: seen.append(a), "end": lambda self, s="": seen.append(s)}
    )
    board = TensorBoard(shown(), tmp_path)
    board.begin("score-erk-0.9 · prune", 10)
    board.advance(3)
    board.epoch(1, 2, ROW)
    board.epoch(2, 2, ROW)
    board.end("done")
    (writer,) = writers
    assert writer.folder == tmp_path / "score-erk-0.9_prune" and writer.closed
    names = [("lr", 0.1), ("train/loss", 2.0), ("validation/loss", 3.0), ("seconds", 1.5)]
    assert writer.scalars == [(*pair, step) for step in (1, 2) for pair in names]
    assert [a[0] for a in seen[:2]] == [1, 2] and seen[2] == "done"


def test_work_without_epochs_writes_nothing(writers, tmp_path):
    board = TensorBoard(Progress(), tmp_path)
    board.begin("certify", 10)
    board.end()
    board.close()
    assert not writers


def test_a_run_writes_every_stage(writers, tmp_path):
    out = tmp_path / "run"
    words = [SMOKE, f"output={out}", "pretrain.epochs=2", "prune.epochs=1", "finetune.epochs=1", "certify.count=2"]
    result = CliRunner().invoke(app, ["run", *words, "--tensorboard"])
    assert result.exit_code == 0, result.output
    stages = {writer.folder.relative_to(out / "tensorboard").name: writer for writer in writers}
    assert {"pretrain", "score-erk-0.8_prune", "score-erk-0.8_finetune"} <= set(stages)
    losses = [(v, step) for name, v, step in stages["pretrain"].scalars if name == "validation/loss"]
    record = read_json(out / "pretrain" / "stage.json")
    assert [step for _, step in losses] == [1, 2] and record["validation"]["loss"] in [v for v, _ in losses]


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'certprune\[log\]'"):
        TensorBoard(Progress(), tmp_path)


def test_the_real_writer(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(Progress(), tmp_path)
    board.begin("pretrain", 10)
    board.epoch(1, 1, ROW)
    board.close()
    events = EventAccumulator(str(tmp_path / "pretrain")).Reload()
    assert events.Scalars("train/loss")[0].value == 2.0
