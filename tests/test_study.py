"""The ``table`` command and the page it writes: the same figures as the ledgers', and nothing left out."""

from __future__ import annotations

import csv

import pytest
from typer.testing import CliRunner

from certifiers.errors import InputError
from certprune.cli import app
from certprune.reports import aggregate, read_run, study_page

from .run_folder import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / f"s{seed}", seed=seed, count=60) for seed in (0, 1)]


def test_page_holds_means_differences_and_origin(runs):
    page = study_page([read_run(run) for run in runs], "Title", "the command")
    assert page.startswith("# Title\n\nMade by `the command`.")
    for row in aggregate([read_run(run) for run in runs], 0.1):
        assert f"{100 * row.certified.value:.1f}" in page
        assert row.label in page
    assert "## Paired differences" in page and "2 seeds" in page
    assert page.count("\n- seed ") == 2


def test_command_writes_markdown_and_csv(runs, tmp_path):
    out = tmp_path / "table.md"
    result = CliRunner().invoke(app, ["table", *map(str, runs), "--eps", "0.1", "--title", "T", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith("# T\n")
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    expected = aggregate([read_run(run) for run in runs], 0.1)
    assert [float(row["certified"]) for row in rows] == [row.certified.value for row in expected]


def test_runs_of_different_recipes_are_refused(runs, tmp_path):
    other = write_run(tmp_path / "other", seed=2, count=60, eps=(0.1,))
    with pytest.raises(InputError, match="certify"):
        study_page([read_run(runs[0]), read_run(other)], "T", "c")
