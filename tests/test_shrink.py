"""``shrink``: the search by itself, on a run, cut off and gone on with, and what it refuses."""

from __future__ import annotations

import csv
import random

import pytest
import yaml

from certifiers.verdict import read_ledger
from certprune.compact import read_compacted
from certprune.runs import open_run
from certprune.shrinking import LEAST, MOST, next_kept
from tests.commands import ONE_EPOCH, smoke_run


def searched(smallest: float, known: list[float], within: float = 1.2) -> tuple[list[float], float | None]:
    """The tries of a search where all networks with at least ``smallest`` of the weights hold, and its result."""
    tried = list(known)
    while True:
        holding = [kept for kept in tried if kept >= smallest]
        kept = next_kept(holding, [kept for kept in tried if kept < smallest], within)
        if kept is None:
            return tried, min(holding, default=None)
        assert kept not in tried
        tried.append(kept)


@pytest.mark.parametrize("seed", range(40))
def test_the_search_ends_near_the_smallest_that_holds(seed):
    draw = random.Random(seed)
    smallest = 10 ** draw.uniform(-3.5, -0.4)
    known = draw.sample([0.1, 0.05, 0.01, 0.005], draw.randint(0, 3))
    tried, found = searched(smallest, known)
    assert smallest <= found <= 1.25 * smallest and len(tried) - len(known) <= 9


def test_the_search_ends_at_the_ends_of_its_range():
    tried, found = searched(0.9, [])
    assert found is None and max(tried) <= MOST
    tried, found = searched(0.0, [])
    assert found == LEAST and min(tried) == LEAST


def test_the_search_by_hand():
    assert next_kept([], [], 1.2) == 0.01
    assert next_kept([], [0.01], 1.2) == 0.04
    assert next_kept([], [0.2], 1.2) == 0.5 and next_kept([], [0.5], 1.2) is None
    assert next_kept([0.01], [], 1.2) == 0.0025
    assert next_kept([0.04], [0.01], 1.2) == 0.02
    assert next_kept([0.04], [0.01, 0.05], 1.2) == 0.02  # what fails above the smallest that holds says nothing
    assert next_kept([0.012], [0.01], 1.2) is None
    assert next_kept([0.0101], [0.01], 1.001) is None  # nothing lies between, to two digits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    only = "variants=[{criterion: magnitude, sparsity: 0.8}]"
    return smoke_run(tmp_path_factory.mktemp("finished") / "smoke", *ONE_EPOCH, only, "certify.count=60")


ASKED = ("--certified-at-least", "0.3", "--eps", "0.02", "--within", "1.6")


def rows(work):
    return list(csv.DictReader((work / "shrink-0.3-eps-0.02.csv").read_text().splitlines()))


def test_shrink_finds_a_small_network_and_tests_it_once(cli, work):
    assert cli("shrink", work, *ASKED) == 0
    found = rows(work)
    weights, holds = [int(row["weights"]) for row in found], [row["holds"] == "1" for row in found]
    assert weights == sorted(weights, reverse=True) and any(holds) and not all(holds)
    smallest = max(i for i, one in enumerate(holds) if one)
    below = weights[smallest + 1] if smallest + 1 < len(weights) else 0
    assert weights[smallest] <= 1.7 * below
    chosen = found[smallest]["variant"]
    page = (work / "shrink-0.3-eps-0.02.md").read_text()
    assert f"| {chosen} |" in page and "yes, chosen" in page and f"The smallest is {chosen}" in cli.out
    assert "…" not in cli.out and f"\n{chosen} " in cli.out, "names in full"
    # Every try is a variant of the run like any other, certified on validation images only.
    recipe = yaml.safe_load((work / "config.yaml").read_text())
    assert {row["variant"] for row in found} <= {v["name"] for v in recipe["variants"]} and recipe["output"] == str(
        work
    )
    header, verdicts = read_ledger(work / "certificates" / chosen / "validation" / "eps-0.02.jsonl")
    assert header["split"] == "validation" and len(verdicts) == int(found[smallest]["images"])
    # The test split: once, the compacted network of the chosen one, as many images as the recipe says.
    small = read_compacted(work / chosen / "compacted.safetensors")
    assert small.origin["variant"] == chosen
    (tested,) = work.glob("*/compacted-certificates/*.jsonl")
    header, verdicts = read_ledger(tested)
    assert header["split"] == "test" and len(verdicts) == 60 and tested.parent.parent.name == chosen
    # Once more: nothing is trained or certified anew, and the report is the same.
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors") if "compacted" not in path.name}
    assert cli("shrink", work, *ASKED) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert rows(work) == found and (work / "shrink-0.3-eps-0.02.md").read_text() == page
    assert cli("report", work) == 0


def test_a_search_that_is_cut_off_goes_on_to_the_same_end(cli, work, monkeypatch):
    from certprune import shrinking

    trained, real = [], shrinking.run_stages

    def cut(run, *rest):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(run)
        real(run, *rest)

    monkeypatch.setattr(shrinking, "run_stages", cut)
    assert cli("shrink", work, *ASKED) == 130
    monkeypatch.setattr(shrinking, "run_stages", real)
    assert cli("shrink", work, *ASKED) == 0
    assert any(row["holds"] == "1" for row in rows(work))
    assert open_run(work).is_complete("finetune", trained[0].recipe.variants[0].name)


def test_a_guarantee_that_nothing_keeps_is_said(cli, work):
    assert cli("shrink", work, "--certified-at-least", "0.999", "--eps", "0.3", "--count", "40") == 0
    assert "No network that was tried keeps 99.9 %" in cli.out and "The nearest is" in cli.out
    assert not list(work.glob("*/compacted*"))


def test_mistakes(cli, work):
    cli.refuses("shrink", work, "--certified-at-least", "65", saying=["between 0 and 1", "65"])
    cli.refuses("shrink", work, "--certified-at-least", "0.5", "--within", "1", saying=["factor above 1"])
    cli.refuses("shrink", work, "--certified-at-least", "0.5", "--like", "none", saying=["'none'", "magnitude-erk-0.8"])
    cli.refuses("shrink", work, "--certified-at-least", "0.5", "--count", "0", saying=["--count"])
    cli.refuses("shrink", work / "pretrain", "--certified-at-least", "0.5", saying=["not a run folder"])
    assert not list(work.glob("shrink*"))
    (work / "pretrain" / "stage.json").unlink()
    cli.refuses("shrink", work, "--certified-at-least", "0.5", saying=["not complete", "certprune run"])
