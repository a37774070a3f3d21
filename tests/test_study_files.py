"""What ``certprune table`` writes: the page, its CSVs and pictures, kept weights, unstable units."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from certifiers.threat import threat
from certprune.cli import app
from certprune.reports import sections_of, write_study
from certprune.reports.kept_weights import kept_weights, told
from certprune.storage import write_tensors
from certprune.unstable import unstable_units
from tests.study_runs import CERTIFIED, IMAGES, PLANS, three_seeds, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return three_seeds(tmp_path_factory.mktemp("runs"))


def test_kept_weights_by_hand(tmp_path):
    run = write(tmp_path / "r", CERTIFIED, plans={**PLANS, "magnitude": {**PLANS["magnitude"], "budget": "erk"}})
    weights = {"conv1.weight": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "conv1.bias": torch.zeros(2)}
    write_tensors(run.folder / "pretrain" / "model.safetensors", weights)
    for name, kept in {"score-erk": [[1, 0], [0, 1]], "magnitude": [[0, 0], [1, 1]]}.items():
        masks = {"conv1.weight": torch.tensor(kept, dtype=torch.bool)}
        write_tensors(run.folder / name / "prune" / "masks.safetensors", masks)
    found = kept_weights(sections_of([run], 0.1)[0])
    assert found.weights["conv1"].tolist() == [1.0, -2.0, 3.0, -4.0]
    assert found.overlap("score") == 0.5
    assert found.typical("magnitude") == pytest.approx(3.5 / found.weights["conv1"].std())
    assert "magnitude keeps 50 %" in told(found) and "ERK budget, seed 0" in told(found)
    files = write_study([run], tmp_path / "page.md", "T", "c", 0.1)
    assert tmp_path / "page-weights.png" in files
    (run.folder / "pretrain" / "model.safetensors").write_bytes(b"damaged")
    assert kept_weights(sections_of([run], 0.1)[0]) is None


def test_unstable_units_by_hand():
    """Two inputs in [0.4, 0.6]: units x1 - 0.5 and x1 - x2 may be of either sign, x1 + 1 and -x2 may not."""
    first, last = nn.Linear(2, 4), nn.Linear(4, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0], [1, -1], [1, 0], [0, -1]]))
        first.bias.copy_(torch.tensor([-0.5, 0, 1, 0]))
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    x = torch.full((3, 1, 1, 2), 0.5)
    found = unstable_units(model, x, threat("linf", 0.1))
    assert (found.mean, found.units) == (2.0, 4)
    x[0] = 0.9  # there only x1 - x2 is unstable
    assert unstable_units(model, x, threat("linf", 0.1)).mean == pytest.approx(5 / 3)


def test_command_writes_page_tables_and_pictures(runs, tmp_path):
    out = tmp_path / "table.md"
    folders = [str(run.folder) for run in runs]
    result = CliRunner().invoke(app, ["table", *folders, "--title", "Heading", "--unstable", "0", "-o", str(out)])
    assert result.exit_code == 0, result.output
    page = out.read_text()
    assert page.startswith("# Heading\n\nMade by `") and page.count("\n- seed ") == 3
    for picture in ("table-clean.png",):
        assert f"]({picture})" in page and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "Learned scores in one shot" in page and "McNemar" in page and "table-certified" not in page
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert len(rows) == 3 * len(CERTIFIED)
    joint = [row for row in rows if row["network"] == "joint"]
    assert [float(row["certified"]) for row in joint] == [count / IMAGES for count in (45, 46, 47)]
    assert {row["unstable_units"] for row in rows} == {""} and {row["how"] for row in joint} == {"gradual"}
    tests = list(csv.DictReader((tmp_path / "table-tests.csv").open()))
    assert len(tests) == 2 + 2 + 1 + 2 and all(0 <= float(row["p_holm"]) <= 1 for row in tests)


def test_networks_without_weights_have_no_count_of_unstable_units(runs, tmp_path):
    result = CliRunner().invoke(app, ["table", str(runs[0].folder), "-o", str(tmp_path / "t.md")])
    assert result.exit_code == 0 and "Unstable units of" in result.output
    assert "| – |" in (tmp_path / "t.md").read_text()


def test_pictures_need_something_to_draw(tmp_path):
    plans = {"dense": PLANS["dense"], **{f"joint-{s}": {**PLANS["joint"], "sparsity": s} for s in (0.9, 0.95, 0.99)}}
    run = write(tmp_path / "r", dict(zip(plans, (50, 49, 48, 40), strict=True)), plans=plans)
    files = {path.name for path in write_study([run], tmp_path / "p.md", "T", "c", 0.1)}
    assert files == {"p.md", "p.csv", "p-tests.csv", "p-certified.png", "p-clean.png"}
    alone = write(tmp_path / "a", {"dense": 50}, plans={"dense": PLANS["dense"]})
    assert {path.name for path in write_study([alone], tmp_path / "a.md", "T", "c", 0.1)} == {"a.md", "a.csv"}
