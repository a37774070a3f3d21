"""``shrink``: the search by itself, on a run, cut off and gone on with, and what it refuses."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from certifiers.errors import InputError
from certifiers.verdict import read_ledger
from certprune.compact import read_compacted
from certprune.data import load_data
from certprune.progress import Progress
from certprune.runs import Run, open_run
from certprune.shrink_report import page_name
from certprune.shrinking import LEAST, MOST, _resized, next_kept
from certprune.stages import run_stages
from tests.commands import ONE_EPOCH, copied_run, smoke_run


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
PAGE = "shrink-0.3-eps-0.02-within-1.6"


def rows(work):
    return list(csv.DictReader((work / f"{PAGE}.csv").read_text().splitlines()))


def test_shrink_finds_a_small_network_and_tests_it_once(cli, work):
    assert cli("shrink", work, *ASKED) == 0
    found = rows(work)
    weights, holds = [int(row["weights"]) for row in found], [row["holds"] == "1" for row in found]
    assert weights == sorted(weights, reverse=True) and any(holds) and not all(holds)
    smallest = max(i for i, one in enumerate(holds) if one)
    below = weights[smallest + 1] if smallest + 1 < len(weights) else 0
    assert weights[smallest] <= 1.7 * below
    chosen = found[smallest]["variant"]
    page = (work / f"{PAGE}.md").read_text()
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
    assert rows(work) == found and (work / f"{PAGE}.md").read_text() == page
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


OWN = (
    "variants=[{criterion: score, sparsity: 0.8}, {criterion: score, sparsity: 0.8, name: own, objective: {eps: 0.1}}]"
)


@pytest.fixture(scope="module")
def two_ways(tmp_path_factory):
    """A run with two variants that are pruned the same way under different objectives."""
    return smoke_run(tmp_path_factory.mktemp("two") / "smoke", *ONE_EPOCH, OWN, "certify.count=60")


def trained_at(work):
    """The eps that each network's stages were trained at, by its name."""
    found = {}
    for path in work.glob("*/*/stage.json"):
        record = json.loads(path.read_text())
        found.setdefault(record["variant"], set()).add(record["objective"]["eps"])
    return found


@pytest.mark.parametrize("order", [("score-erk-0.8", "own"), ("own", "score-erk-0.8")])
def test_a_search_takes_no_network_of_another_objective_for_its_own(cli, two_ways, tmp_path, order):
    work, asked = copied_run(two_ways, tmp_path / "smoke"), ("--certified-at-least", "0.3", "--eps", "0.02")
    for like in order:
        assert cli("shrink", work, *asked, "--like", like) == 0
    names = {
        like: work / f"shrink-0.3-eps-0.02{end}" for like, end in zip(sorted(order), ("-like-own", ""), strict=True)
    }
    for like, page in names.items():
        wanted = {0.1 if like == "own" else 0.02}
        tries = list(csv.DictReader(Path(f"{page}.csv").read_text().splitlines()))
        assert len(tries) > 2 and all(trained_at(work)[row["variant"]] == wanted for row in tries)
        assert all(row["variant"].startswith("own" if like == "own" else "score-erk") for row in tries)
    before = (work / "config.yaml").read_text(), [Path(f"{page}.csv").read_text() for page in names.values()]
    for like in order:  # again: nothing is new
        assert cli("shrink", work, *asked, "--like", like) == 0
    assert before == ((work / "config.yaml").read_text(), [Path(f"{page}.csv").read_text() for page in names.values()])


def test_a_name_that_is_taken_is_not_given_again(two_ways):
    run = open_run(two_ways)
    plain, own = run.recipe.variants
    taken = [own.model_copy(update={"name": name, "sparsity": 0.5}) for name in ("score-erk-0.9", "score-erk-0.8-0.9")]
    recipe = run.recipe.model_copy(update={"variants": (plain, own, *taken)})
    new = _resized(recipe, plain, 0.1)
    assert new.name == "score-erk-0.8-0.9-2" and new.objective is None and new.sparsity == 0.9
    again = recipe.model_copy(update={"variants": (*recipe.variants, new)})
    assert _resized(again, plain, 0.1) == new, "a search that was cut off goes on with its own"


def test_a_stage_that_was_cut_off_is_not_gone_on_with_under_another_objective(two_ways, tmp_path):
    class Stop(Progress):
        def epoch(self, epoch, of, row):
            raise KeyboardInterrupt

    work, data, cpu = copied_run(two_ways, tmp_path / "smoke"), load_data("digits", validation=0.1), torch.device("cpu")
    recipe = open_run(work).recipe
    recipe = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"epochs": 2})})
    weak, strong = (
        Run(work, recipe.model_copy(update={"variants": (variant.model_copy(update={"name": "cut"}),)}))
        for variant in recipe.variants
    )
    with pytest.raises(KeyboardInterrupt):
        run_stages(weak, data, cpu, progress=Stop())
    with pytest.raises(InputError, match="should have eps 0.1, but the file was trained with eps 0.02"):
        run_stages(strong, data, cpu)
    run_stages(weak, data, cpu)
    assert trained_at(work)["cut"] == {0.02}


def test_another_search_has_a_page_of_its_own():
    names = [
        page_name(0.5, 0.1),
        page_name(0.5, 0.1, within=1.5),
        page_name(0.5, 0.1, within=2),
        page_name(0.5, 0.1, "own-0.9", 1.5, 40),
    ]
    assert names == [
        "shrink-0.5-eps-0.1",
        "shrink-0.5-eps-0.1-within-1.5",
        "shrink-0.5-eps-0.1-within-2",
        "shrink-0.5-eps-0.1-like-own-0.9-within-1.5-count-40",
    ]


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
