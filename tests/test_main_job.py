"""The main job, small, as a user runs it: one command in a process of its own, from a recipe to a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from certifiers.verdict import Status, read_ledger
from certprune.runs import open_run

ROOT = Path(__file__).parent.parent
VARIANTS = ("score-erk-0.8", "magnitude-erk-0.8")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), "run", str(ROOT / "configs" / "smoke.yaml")]
    shown = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    return folder / "runs" / "smoke", shown


def test_it_ends_with_the_table_and_the_report(done):
    folder, shown = done
    assert shown.stderr == ""
    table = shown.stdout[shown.stdout.index("linf eps 0.02, 100 digits test images") :]
    for word in ("Sparsity", "Clean", "Attack", "Certified", "Seconds", "learned scores", "least magnitude"):
        assert word in table
    assert re.search(r"\[\d+\.\d, \d+\.\d\]", table), "an interval beside each accuracy"
    assert table.rstrip().endswith("Report: runs/smoke/report.html")
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "learned scores" in page


def test_progress_is_plain_lines_when_there_is_no_terminal(done):
    _, shown = done
    lines = shown.stdout.splitlines()
    assert "\x1b" not in shown.stdout and "\r" not in shown.stdout
    assert sum(line.startswith("pretrain: epoch") for line in lines) == 4  # one an epoch
    epochs = [line for line in lines if re.search(r": epoch \d+/\d+", line)]
    assert len(epochs) == 12 and all("images/s" in line and "left" in line for line in epochs)
    assert len(lines) < 50


def test_the_run_folder_describes_itself(done):
    folder, _ = done
    record = json.loads((folder / "provenance.json").read_text())
    assert record["seed"] == 0 and record["threads"] == 1 and record["packages"]["torch"]
    assert "smoke.yaml" in record["command"] and record["hardware"]["cores"] >= 1
    run = open_run(folder)
    for name in VARIANTS:
        for stage in ("prune", "finetune"):
            made = run.stage_record(stage, name)
            assert made["sparsity"]["total"] == pytest.approx(0.8, abs=0.01)
            assert record["stages"][f"{name}/{stage}"]["epochs"] == made["epochs"]
            rows = (folder / name / stage / "metrics.jsonl").read_text().splitlines()
            assert len(rows) == made["epochs"]
    assert not list(folder.rglob("state.pt")) and not list(folder.rglob("*.tmp"))


def test_every_variant_trains_for_the_same_number_of_epochs(done):
    run = open_run(done[0])
    epochs = {name: [run.stage_record(stage, name)["epochs"] for stage in ("prune", "finetune")] for name in VARIANTS}
    assert epochs == {VARIANTS[0]: [2, 2], VARIANTS[1]: [0, 4]}


def test_score_pruning_moves_scores_and_nothing_else(done):
    run = open_run(done[0])
    before = run.load_model("pretrain").state_dict()
    for name in VARIANTS:
        pruned, masks = run.load_model(name, "prune").state_dict(), run.load_masks(name)
        for key, tensor in before.items():
            assert pruned[key].equal(tensor * masks[key] if key in masks else tensor)
    kept = [run.load_masks(name) for name in VARIANTS]
    assert any(not kept[0][key].equal(kept[1][key]) for key in kept[0])


def test_finetuning_keeps_the_masks(done):
    run = open_run(done[0])
    for name in VARIANTS:
        before, after = run.load_model(name, "prune").state_dict(), run.load_model(name).state_dict()
        masks = run.load_masks(name)
        assert all((after[key][~mask] == 0).all() for key, mask in masks.items())
        assert any(not after[key].equal(before[key]) for key in masks)


def test_every_image_has_a_verdict_and_some_are_proven(done):
    run = open_run(done[0])
    for name in VARIANTS:
        certified = {}
        for eps in (0.01, 0.02):
            header, verdicts = read_ledger(run.ledger_path(name, eps))
            assert (header["variant"], header["eps"], header["split"]) == (name, eps, "test")
            assert sorted(verdict.index for verdict in verdicts) == list(range(100))
            certified[eps] = sum(verdict.status is Status.certified for verdict in verdicts)
        assert certified[0.01] >= certified[0.02] > 30  # a constant prediction would get about 10


def test_the_networks_have_learnt(done):
    run = open_run(done[0])
    for name in VARIANTS:
        validation = run.stage_record("finetune", name)["validation"]
        assert validation["clean_accuracy"] > 0.5 and validation["certified_accuracy"] > 0.3
