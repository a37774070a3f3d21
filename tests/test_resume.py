"""A run that is killed again and again ends like one that is not: same weights to the bit, same verdicts once each.

The runs are processes of their own, killed by SIGKILL. They are forked from one server that has imported
everything, so that a kill costs no import.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from certifiers import files
from certprune import storage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")

ROOT = Path(__file__).parent.parent
SERVER = """
import json, os, sys
import matplotlib.figure, sklearn.datasets, torch
import certprune.certifying, certprune.data, certprune.reports, certprune.stages
from certprune.cli import main

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 70
        try:
            main(json.loads(line))
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not reaped yet: its number stays its own
    print("ended", flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Starts runs, each in a process of its own."""

    def __init__(self, folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, arguments, kill_when=None, after=0.0):
        """The exit code of ``certprune ARGUMENTS``; -9 if it was killed ``after`` seconds, once ``kill_when()``."""
        self._say(json.dumps([str(argument) for argument in arguments]))
        child = int(self.process.stdout.readline())
        if kill_when is not None or after:
            self._kill(child, kill_when, after)
        assert self.process.stdout.readline() == "ended\n"
        self._say("")
        return int(self.process.stdout.readline())

    def _kill(self, child, kill_when, after):
        began = time.monotonic()
        while time.monotonic() - began < after or (kill_when and not kill_when()):
            if _is_zombie(child) or time.monotonic() - began > 120:
                return
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def _say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _is_zombie(child):
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def command(folder):
    """A run with several epochs a stage and many small ledger writes."""
    settings = ["pretrain.epochs=5", "prune.epochs=3", "finetune.epochs=2", "certify.count=60",
                "certify.batch_size=5", f"output={folder}"]  # fmt: skip
    return ["run", ROOT / "configs" / "smoke.yaml", *settings]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nothing interrupted, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    assert server.run(command(folder)) == 0
    return folder, time.monotonic() - began


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "stages")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def lines(path):
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()]


def assert_same(run, reference):
    """Weights and masks equal byte by byte; records and verdicts equal but for times; nothing left behind."""
    files = {path.relative_to(reference) for path in reference.rglob("*") if path.is_file()}
    assert {path.relative_to(run) for path in run.rglob("*") if path.is_file()} == files
    weights = [name for name in files if name.suffix == ".safetensors"]
    assert len(weights) == 1 + 2 * 4  # pretrained; two variants with weights and masks of two stages
    for name in weights:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    for name in (name for name in files if name.name == "metrics.jsonl"):
        assert lines(run / name) == lines(reference / name), name
    for name in (name for name in files if name.name == "stage.json"):
        made, expected = (json.loads((folder / name).read_text()) for folder in (run, reference))
        assert without_times(made) == without_times(expected), name
    ledgers = [name for name in files if name.parts[0] == "certificates"]
    assert len(ledgers) == 4
    for name in ledgers:
        header, *rows = lines(run / name)
        expected_header, *expected = lines(reference / name)
        assert header == expected_header
        assert [row["index"] for row in rows] == list(range(60)), "each image once"
        assert rows == expected
    stages = [json.loads((folder / "provenance.json").read_text())["stages"] for folder in (run, reference)]
    assert without_times(stages[0]) == without_times(stages[1])


def rows_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_in_training_at_a_stage_end_and_while_certifying(server, whole, tmp_path):
    run = tmp_path / "run"
    score = run / "score-erk-0.8"
    moments = [
        lambda: rows_in(run / "pretrain" / "metrics.jsonl") >= 2,
        lambda: (score / "prune" / "masks.safetensors").exists(),
        lambda: rows_in(run / "certificates" / "magnitude-erk-0.8" / "eps-0.01.jsonl") >= 12,
    ]
    for moment in moments:
        assert server.run(command(run), kill_when=moment) == -signal.SIGKILL
    assert rows_in(run / "certificates" / "magnitude-erk-0.8" / "eps-0.01.jsonl") < 61  # it was in the midst
    assert server.run(command(run)) == 0
    assert_same(run, whole[0])
    assert len(json.loads((run / "provenance.json").read_text())["resumed"]) == 3


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stage.json"
    storage.write_json(path, {"epoch": 1})

    def killed(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, step, killed)
            storage.write_json(path, {"epoch": 2})
        assert storage.read_json(path) == {"epoch": 1}
    storage.write_json(path, {"epoch": 2})
    assert storage.read_json(path) == {"epoch": 2} and [p.name for p in tmp_path.iterdir()] == ["stage.json"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_twenty_random_moments(server, whole, tmp_path, seed):
    reference, seconds = whole
    chance = random.Random(seed)
    kills = 0
    while kills < 20:
        run = tmp_path / f"run{kills}"
        while True:
            # Short lives: a run must take many to end.
            code = server.run(command(run), after=chance.uniform(0.0, 0.4) * seconds)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
            if kills >= 20:
                assert server.run(command(run)) == 0
                break
        assert_same(run, reference)
        shutil.rmtree(run)
