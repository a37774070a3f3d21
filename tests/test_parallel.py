"""Training by several processes equals training by one; a process that dies ends the run, which then resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from certifiers.errors import InputError
from certprune.data import load_data
from certprune.data.augment import crop
from certprune.data.batches import in_order
from certprune.parallel import World, own_device, world
from certprune.recipes import load_recipe
from certprune.runs import Run, open_run, start_run
from certprune.sharing import certify_together
from certprune.stages import run_stages

ROOT = Path(__file__).parent.parent
WORDS = ["pretrain.epochs=2", "prune.epochs=1", "finetune.epochs=1", "threads=1", "device=cpu"]
PLACES = [("pretrain", "pretrain"), ("score-erk-0.8", "prune"), ("score-erk-0.8", "finetune")]
# The warm-up's regulariser is no mean over images.
CROWN = ["objective.warm_up.weight=0", "variants=[{criterion: score, sparsity: 0.8}]", "certify.count=7"]
CROWN += ["certify.attack_steps=2", "certify.smoothing={sigma: 0.25, n: 60, n0: 10, count: 5}"]
NORMED = [*CROWN, "objective={name: benign}", "model={name: mlp, hidden: [16], batch_norm: true}"]

WORKER = """
import os, sys
import torch
from certprune.data import load_data
from certprune.parallel import joined
from certprune.runs import open_run
from certprune.sharing import certify_together
from certprune.stages import run_stages
from certprune.training import Progress

class Dies(Progress):
    def epoch(self, number, epochs, row):
        if os.environ.get("DIES") and number == 1 and os.environ["RANK"] == "1":
            os._exit(3)

torch.set_num_threads(1)
with joined(torch.device("cpu")) as among:
    run = open_run(sys.argv[1])
    data = load_data("digits")
    run_stages(run, data, torch.device("cpu"), progress=Dies())
    certify_together(run, data, torch.device("cpu"), among)
    os.write(1, f"{'leads' if among.leads else 'follows'} {among.size}\\n".encode())  # whole lines, whoever writes too
"""


def torchrun(path: Path, processes: int, script: str = WORKER, **more: str) -> subprocess.CompletedProcess:
    """A script, the worker above on a run folder unless given, by that many processes of this machine."""
    file = path.parent / "worker.py"
    file.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [*command, str(file), str(path)], capture_output=True, text=True, env=environment, timeout=280
    )


def started(folder: Path, words: list[str]) -> Run:
    recipe = load_recipe(ROOT / "configs" / "smoke.yaml", [*WORDS, *words, f"output={folder}"])
    return start_run(recipe, "test", 1, "cpu")


def alone(folder: Path, words: list[str]) -> Run:
    run = started(folder, words)
    run_stages(run, load_data("digits"), torch.device("cpu"))
    certify_together(run, load_data("digits"), torch.device("cpu"), World())
    return run


def verdicts(run: Run) -> dict:
    """What each ledger of the run says of each image, but for times and a margin's last digits."""
    found = {}
    for path in sorted((run.folder / "certificates").rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        kept = [{k: v for k, v in row.items() if k not in ("seconds", "stages", "margin")} for row in rows]
        found[path.name] = sorted(kept, key=lambda row: row["index"])
    return found


def assert_alike(one: Run, two: Run) -> None:
    for variant, stage in PLACES:
        a, b = (run.load_model(variant, stage).state_dict() for run in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
        records = [run.stage_record(stage, variant) for run in (one, two)]
        assert records[0]["selected_epoch"] == records[1]["selected_epoch"]
        assert records[0]["validation"] == pytest.approx(records[1]["validation"], rel=1e-4)
    masks = [run.load_masks("score-erk-0.8") for run in (one, two)]
    assert all(masks[0][key].equal(masks[1][key]) for key in masks[0])


def test_two_processes_train_what_one_trains(tmp_path):
    run = started(tmp_path / "two", CROWN)
    done = torchrun(run.folder, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split("\n")[:2]) == ["follows 2", "leads 2"]
    one = alone(tmp_path / "one", CROWN)
    assert_alike(one, open_run(run.folder))
    assert verdicts(one) == verdicts(run) and [len(rows) for rows in verdicts(run).values()] == [7, 7, 5]
    assert not (run.folder / ".shards").exists()


def test_shards_make_up_the_whole_whatever_their_number(tmp_path, monkeypatch):
    """The processes one after the other: those that end before the leader begins have been killed, as it were."""
    one = alone(tmp_path / "one", CROWN)
    expected = verdicts(one)
    data, cpu = load_data("digits"), torch.device("cpu")
    monkeypatch.setattr(World, "wait", lambda self: None)
    for size in (2, 3, 9):
        shutil.rmtree(one.folder / "certificates")
        for rank in reversed(range(size)):
            certify_together(one, data, cpu, World(rank, size))
        assert verdicts(one) == expected and not (one.folder / ".shards").exists()
    ledger = one.ledger_path("score-erk-0.8", 0.02)
    before = ledger.stat().st_mtime_ns
    monkeypatch.setattr("certprune.certifying.certify", lambda *a, **k: pytest.fail("decided already"))
    certify_together(one, data, cpu, World(1, 2))  # what is decided is not asked again
    certify_together(one, data, cpu, World())
    assert verdicts(one) == expected and ledger.stat().st_mtime_ns >= before


@pytest.mark.slow
def test_a_dead_process_ends_the_run_and_another_number_goes_on(tmp_path):
    run = started(tmp_path / "two", CROWN)
    killed = torchrun(run.folder, 2, DIES="1")
    assert killed.returncode != 0
    assert "exitcode  : 3" in killed.stderr or "has ended or cannot be reached" in killed.stderr
    assert (run.folder / "pretrain" / "state.pt").exists() and not (run.folder / "pretrain" / "stage.json").exists()
    alone_again = open_run(run.folder)
    run_stages(alone_again, load_data("digits"), torch.device("cpu"))  # one process goes on
    assert_alike(alone(tmp_path / "one", CROWN), open_run(run.folder))


@pytest.mark.slow
def test_local_batch_norm_has_the_same_running_statistics_everywhere(tmp_path):
    """Each process normalises its part alone, so weights differ from one process's; the network is still one."""
    run = started(tmp_path / "two", NORMED)
    done = torchrun(run.folder, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    one = alone(tmp_path / "one", NORMED)
    for key, value in one.load_model("pretrain").state_dict().items():
        if "running" in key:
            other = open_run(run.folder).load_model("pretrain").state_dict()[key]
            assert not other.equal(value) and (other - value).abs().max() < 0.1 * (1 + value.abs().max())


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    out = tmp_path / "run"
    words = [*WORDS, *CROWN, f"output={out}", "certify.count=3", "certify.attack_steps=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "run.py"), "run", str(ROOT / "configs" / "smoke.yaml"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "report.html").exists() and done.stdout.count("Report:") == 1


# Without other processes


def test_alone_nothing_changes():
    assert world() == World(0, 1) and world().leads
    batches = [(torch.rand(4, 2), torch.arange(4)) for _ in range(3)]
    assert [x is y for (x, _), (y, _) in zip(World().parts(batches), batches, strict=True)] == [True] * 3
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    World().average_gradients([layer.weight])
    World().as_leader(layer)
    assert (layer.weight.grad == 1).all() and World().gather({"a": 1}) == [{"a": 1}]


def test_parts_make_up_the_batch_and_draw_noise_of_their_own():
    x = torch.rand(6, 3, 9, 9)

    def batches():
        for _ in range(3):
            yield crop(x), torch.arange(6)

    def run(rank, size):
        torch.manual_seed(7)
        found = []
        for part, labels in World(rank, size).parts(batches()):
            found.append((part, labels, torch.rand(2) if size > 1 else None))  # an objective's noise
        return found

    whole, parts = run(0, 1), [run(rank, 2) for rank in range(2)]
    for step in range(3):
        for rank in range(2):
            assert torch.equal(parts[rank][step][0], whole[step][0][rank::2])  # augmented as in a single process
            assert parts[rank][step][1].tolist() == list(range(rank, 6, 2))
        assert not torch.equal(parts[0][step][2], parts[1][step][2])
    assert not torch.equal(parts[0][0][2], parts[0][1][2])


def test_validation_is_shared_out_by_batches():
    split = load_data("digits").validation
    whole = [y.tolist() for _, y in in_order(split, 50, torch.device("cpu"))]
    parts = [[y.tolist() for _, y in in_order(split, 50, torch.device("cpu"), (i, 2))] for i in range(2)]
    assert parts == [whole[0::2], whole[1::2]]


def test_errors(monkeypatch):
    with pytest.raises(InputError, match="batch of 9 images cannot be parted evenly among 2 processes"):
        World(0, 2).check_batch(9)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(torch.device("cpu")).type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="needs a GPU of its own, but there are 1"):
        own_device(torch.device("cuda"))
