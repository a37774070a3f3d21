"""The page of a study and its tables, on run folders whose figures are counted by hand."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from typer.testing import CliRunner

from certifiers.errors import InputError
from certprune.cli import app
from certprune.reports import read_run, sections_of, write_study
from certprune.reports.compare import pairs_to_compare
from certprune.reports.following import following
from certprune.reports.paired_tests import crossed_difference
from certprune.reports.study import missing_lines
from certprune.reports.study_charts import main_ways
from certprune.reports.study_csv import networks_csv
from certprune.reports.study_tests import (
    against_dense,
    against_elsewhere,
    against_magnitude,
    against_published,
    at_equal_budgets,
    chosen,
)
from tests.run_folder import sparsity_record
from tests.study_runs import CERTIFIED, IMAGES, PLANS, three_seeds, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return three_seeds(tmp_path_factory.mktemp("runs"))


def rows_of(section, level):
    return {row.network.name: row for row in section.groups[level]}


def test_rows_by_sparsity_with_means_over_the_seeds(runs):
    (section,) = sections_of(runs, 0.1)
    assert (list(section.groups), section.seeds) == ([0.0, 0.99], (0, 1, 2))
    rows = rows_of(section, 0.99)
    assert rows["joint"].label == "scores and weights together, global, gradual"
    assert rows["joint"].mean("certified") == pytest.approx(46 / IMAGES)
    assert rows["joint"].rate("certified").lower == pytest.approx(46 / 60 - 4.302652729911275 / 60 / 3**0.5)
    assert rows["joint"].mean("clean") == pytest.approx(49 / IMAGES)
    assert rows["joint"].mean("validation_certified") == pytest.approx(0.46)
    assert rows["joint"].mean("epochs") == 8 and rows["joint"].mean("unstable_units") is None
    assert section.dense.network.name == "dense" and section.dense.mean("ibp") == pytest.approx(51 / IMAGES)


def test_comparisons_hold_the_right_networks_against_each_other(runs):
    (section,) = sections_of(runs, 0.1)

    def pairs(question):
        return {(row.first.network.name, row.second.network.name) for row in question(section)}

    assert pairs(against_magnitude) == {("score-erk", "global"), ("joint", "global")}
    assert pairs(against_dense) == {("score-erk", "dense"), ("joint", "dense")}
    assert pairs(against_published) == {("joint", "score")}
    assert pairs(at_equal_budgets) == {("score", "magnitude"), ("joint", "global")}
    assert pairs(against_elsewhere) == set()


def test_a_comparison_is_that_of_the_ledgers(runs):
    (section,) = sections_of(runs, 0.1)
    (row,) = against_published(section)
    assert row.crossed.difference.value == pytest.approx(25 / IMAGES) and row.images == IMAGES
    for seed, run in enumerate(runs):
        held = [
            {v.index for v in run.variant(name).ledger(0.1).verdicts if v.status.value == "certified"}
            for name in ("joint", "score")
        ]
        assert row.seeds[seed][:3] == (seed, len(held[0] - held[1]), len(held[1] - held[0]))
    assert row.crossed.p < 0.05 and row.adjusted == row.crossed.p  # one comparison in the table


@pytest.mark.parametrize("same", [True, False])
def test_seeds_share_their_images_only_where_labels_say_so(same, tmp_path):
    runs = [write(tmp_path / f"s{seed}", {"dense": 50, "joint": (48, 50, 49)[seed]}, seed) for seed in range(3)]
    if not same:  # a data set that is split by the seed
        for path in runs[1].folder.glob("certificates/*/*.jsonl"):
            path.write_text(
                path.read_text().replace('"label": 0', '"label": 7').replace('"prediction": 0', '"prediction": 7')
            )
    (section,) = sections_of([read_run(run.folder) for run in runs], 0.1)
    (row,) = against_dense(section)
    certified = [
        [{v.index: v.status.value == "certified" for v in each.nets[seed].ledger.verdicts} for seed in range(3)]
        for each in (row.first, row.second)
    ]
    first, second = (np.array([[held[i] for i in range(IMAGES)] for held in seeds], dtype=int) for seeds in certified)
    assert first.sum(axis=1).tolist() == [48, 50, 49]
    gaps = first - second
    assert row.same is same and row.crossed == crossed_difference(gaps, same)
    assert same or row.clustered is None
    page = write_study(section.runs, tmp_path / "page.md", "Study", "command", 0.1)[0].read_text()
    assert ("the same under every seed" in page) is same and ("images of its own" in page) is not same


def test_networks_of_another_eps_are_no_baseline_and_say_so(tmp_path):
    """An own objective may have other settings alone; then it has no name."""
    nets = {"score": 20, "magnitude": 15, "global": 38}
    plans = {key: {**PLANS[key], "budget": "uniform", "schedule": "one_shot"} for key in nets}
    plans["magnitude"] = {**plans["magnitude"], "objective": {"eps": 0.15, "kappa": {"end": 0.5}}}
    run = write(tmp_path / "r", nets, plans=plans)
    (section,) = sections_of([run], 0.1)
    for found in (at_equal_budgets(section), against_magnitude(section)):
        assert [row.second.network.name for row in found] == ["global"]
    assert [(first.name, second.name) for first, second in pairs_to_compare(run)] == [("score", "global")]
    assert "least magnitude (eps 0.15, kappa.end 0.5), uniform" in {row.label for row in section.rows}


def test_the_dense_network_of_another_recipe_is_no_yardstick(tmp_path):
    first = write(tmp_path / "a", {"dense": 50, "joint": 48})
    second = write(tmp_path / "b", {"joint": 47}, name="other", plans={"joint": PLANS["joint"]})
    (section,) = sections_of([first, second], 0.1)
    assert [row.first.mean("certified") for row in against_dense(section)] == [48 / IMAGES]


def test_budgets_are_chosen_on_validation_images_never_on_test_images(tmp_path):
    validation = {"magnitude": 90, "global": 10}
    run = write(tmp_path / "r", CERTIFIED, validation=validation)
    (section,) = sections_of([run], 0.1)
    assert {row.second.network.name for row in against_magnitude(section)} == {"magnitude"}
    rows = [row for row in section.groups[0.99] if row.network.criterion == "magnitude"]
    for path in (tmp_path / "r").glob("*/finetune/metrics.jsonl"):
        path.unlink()
    (section,) = sections_of([read_run(tmp_path / "r")], 0.1)
    assert against_magnitude(section) == []  # nothing to choose by, so nothing is chosen
    assert chosen(rows[:1]) is rows[0] and chosen([]) is None


def test_one_seed_is_tested_over_its_images_alone(tmp_path):
    (section,) = sections_of([write(tmp_path / "r", CERTIFIED)], 0.1)
    for row in against_dense(section):
        assert row.crossed.p is None and row.adjusted is None and row.crossed.difference.lower is None
        assert len(row.seeds) == 1 and 0 <= row.seeds[0].p <= 1


def test_what_is_missing_is_said_and_is_never_a_zero(runs, tmp_path):
    fewer = {key: plan for key, plan in PLANS.items() if key != "score"}
    part = write(tmp_path / "part", {"dense": 50, "joint": 40, "score-erk": 9}, 3, plans=fewer, stop="score-erk")
    out = tmp_path / "page.md"
    write_study([*runs, part], out, "T", "c", 0.1, note="Asked before.")
    assert out.read_text().startswith("# T\n\nAsked before.\n\nMade by `c`.\n")
    page = out.read_text()
    (section,) = sections_of([*runs, part], 0.1)
    assert list(rows_of(section, 0.99)["score-erk"].nets) == [0, 1, 2]
    assert "| 3 of 4 |" in page and "| 4 of 4 |" in page
    assert "- part: training has not begun: magnitude, global.\n" in page
    assert "- part: not in this run's recipe: score.\n" in page
    assert "- part: at eps 0.1 only 10 of 60 images are decided: score-erk.\n" in page
    assert "| – |" in page  # unstable units were not counted
    assert not any("| 0.0 |" in line for line in page.splitlines() if line.endswith("of 4 |"))


def test_best_of_a_sparsity_is_bold_and_only_among_those_with_most_seeds(runs, tmp_path):
    more = {"winner": {"criterion": "score", "budget": "global", "sparsity": 0.99}}
    lucky = write(tmp_path / "lucky", {**CERTIFIED, "winner": 60}, 4, plans={**PLANS, **more})
    out = tmp_path / "page.md"
    write_study([*runs, lucky], out, "T", "c", 0.1)
    bold = [line for line in out.read_text().splitlines() if "**" in line and line.startswith("|")]
    assert len(bold) == 1 and bold[0].startswith("| scores and weights together, global, gradual |")
    assert "**76.2** [" in bold[0]


def test_a_small_dense_network_stands_where_as_many_weights_are_left(runs, tmp_path):
    weights = sparsity_record(0.99)["kept"]
    small = write(
        tmp_path / "small",
        {"dense": 30},
        plans={"dense": {"dense": True}},
        name="small",
        kept=weights,
        model={"name": "cnn_small", "width": 0.1},
    )
    (section,) = sections_of([*runs, small], 0.1)
    row = section.groups[0.99][-1]
    assert (row.small, row.label) == (True, "dense from the start, cnn_small (width 0.1)")
    assert section.dense.network.name == "dense" and not section.dense.small
    (line,) = [row for row in csv.DictReader(io.StringIO(networks_csv([section], 0.1))) if "width" in row["model"]]
    assert (line["kept"], line["recipe"]) == (str(weights), "small")


def test_more_networks_of_one_recipe_in_further_runs(runs, tmp_path):
    plans = {"joint": PLANS["joint"], "snip": {"criterion": "snip", "budget": "global", "sparsity": 0.99}}
    parts = write(tmp_path / "parts", {"joint": 5, "snip": 30}, plans=plans, name="study_parts")
    (section,) = sections_of([*runs, parts], 0.1)
    rows = rows_of(section, 0.99)
    assert {row.recipe for row in rows.values()} == {0} and list(rows["snip"].nets) == [0]
    assert rows["joint"].each("certified") == [count / IMAGES for count in (45, 46, 47)]  # from the first of the two
    lines = missing_lines([*runs, parts])
    assert lines == ["s1: not in this run's recipe: snip.", "s2: not in this run's recipe: snip."]


def test_another_architecture_is_a_section_of_its_own(runs, tmp_path):
    large = write(tmp_path / "large", CERTIFIED, model={"name": "cnn_large"})
    assert [section.model for section in sections_of([*runs, large], 0.1)] == ["cnn_small", "cnn_large"]


@pytest.mark.parametrize("loss", [{"name": "benign"}, {"kappa": {"end": 1}}], ids=["name", "share"])
def test_masks_by_another_loss_are_told_apart_and_tested(loss, runs, tmp_path):
    plans = {"score-erk": PLANS["score-erk"], "magnitude": PLANS["magnitude"]}
    benign = [
        write(
            tmp_path / f"b{seed}",
            {"score-erk": 12, "magnitude": 12},
            seed,
            plans=plans,
            name="benign",
            prune={"epochs": 4, "objective": loss},
        )
        for seed in (0, 1, 2)
    ]
    (section,) = sections_of([*runs, *benign], 0.1)
    (row,) = against_elsewhere(section)
    assert row.second.label == "learned scores (benign), ERK" and row.first.label == "learned scores, ERK"
    assert row.crossed.difference.value == pytest.approx(29 / IMAGES)
    assert {row.second.network.name for row in against_magnitude(section)} == {"global"}
    again = [row for row in section.groups[0.99] if row.label == "least magnitude, uniform (benign)"]
    assert len(again) == 1 and not again[0].elsewhere  # it looks at weights that were pretrained for the robust loss
    if "kappa" in loss:
        return
    write_study([*runs, *benign], tmp_path / "p.md", "T", "c", 0.1)
    page = (tmp_path / "p.md").read_text()
    assert "knows nothing of robustness" in page and "are certified on +48.3 to +48.3 points more" in page


def test_sentence_about_clean_accuracy_says_what_the_figures_say(runs):
    (section,) = sections_of(runs, 0.1)
    certified, attack = following(section)
    assert certified.points == 15 and certified.pearson.value == pytest.approx(1.0)  # clean is certified and three more
    assert certified.sentence.startswith("Certified accuracy follows clean accuracy closely")
    assert attack.spread == pytest.approx(0.0, abs=1e-9)


def test_a_baseline_at_two_sparsities_is_no_curve_where_others_have_more(tmp_path):
    ways = {"joint": (0.9, 0.95, 0.99), "score-erk": (0.9, 0.99), "magnitude": (0.9, 0.99)}
    plans = {f"{way}-{level}": {**PLANS[way], "sparsity": level} for way, levels in ways.items() for level in levels}
    run = write(tmp_path / "r", dict.fromkeys(plans, 30), plans=plans)
    (section,) = sections_of([run], 0.1)
    curves = [[row.network.name for row in rows] for rows in main_ways(section)]
    assert sorted(curves) == [["joint-0.9", "joint-0.95", "joint-0.99"], ["score-erk-0.9", "score-erk-0.99"]]


def test_refusals(runs, tmp_path):
    result = CliRunner().invoke(app, ["table", str(runs[0].folder), "--eps", "0.3"])
    assert result.exit_code == 2 and "no network certified at eps 0.3" in " ".join(result.output.split())
    with pytest.raises(InputError, match="same seed 0"):
        sections_of([runs[0], runs[0]], 0.1)
    with pytest.raises(InputError, match="Give a .md name"):
        write_study(runs, tmp_path / "x.csv", "T", "c", 0.1)
