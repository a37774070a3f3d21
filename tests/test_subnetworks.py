"""Objectives per variant, networks that nobody finetunes, and the report's accuracy against sparsity."""

from __future__ import annotations

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest
import torch
import yaml

from certifiers.errors import InputError
from certprune.data import load_data
from certprune.recipes import differences, dump_recipe, load_recipe, parse_recipe
from certprune.reports import families_of, read_run, write_report
from certprune.reports.look import Network, label
from certprune.reports.sparsity import line_styles, many_networks, sparsity_csv, sparsity_lines, sparsity_panels
from certprune.runs import start_run
from certprune.stages import run_stages, stage_epochs
from tests.run_folder import config_of, sparsity_record, verdict, write_ledger
from tests.test_objectives_table import smooth

IBP = {"name": "ibp", "eps": 0.1}
MINIMAL = {"name": "r", "data": {"name": "digits"}, "model": {"name": "mlp"}, "objective": {"name": "benign"}}


def recipe_with(*variants, **changes):
    return parse_recipe({**MINIMAL, **changes, "variants": list(variants)})


def test_a_variants_objective_lies_over_the_stages():
    recipe = recipe_with(
        {"objective": IBP},
        {"objective": {"kappa": {"end": 0.25}}, "name": "mine"},
        {"criterion": "magnitude"},
        objective={"name": "crown_ibp", "eps": 0.1, "kappa": {"end": 0.1}},
        prune={"objective": {"eps": 0.2, "kappa": {"end": 0.5}}},
    )
    other, weighted, plain = recipe.variants
    found = recipe.stage_objective("prune", other)
    assert (found["name"], found["eps"], found["kappa"]["end"]) == ("ibp", 0.1, 0.0)  # replaced: nothing of the stage's
    found = recipe.stage_objective("prune", weighted)
    assert (found["name"], found["eps"], found["kappa"]) == ("crown_ibp", 0.2, {"start": 1.0, "end": 0.25})
    assert recipe.stage_objective("finetune", weighted)["eps"] == 0.1
    assert recipe.stage_objective("prune", plain) == recipe.stage_objective("prune")
    assert recipe.stage_objective("pretrain")["name"] == "crown_ibp"


def test_variants_are_named_by_their_objective():
    recipe = recipe_with({"objective": IBP, "sparsity": 0.5}, {"sparsity": 0.5}, {"dense": True, "objective": IBP})
    assert [variant.name for variant in recipe.variants] == ["score-ibp-erk-0.5", "score-erk-0.5", "dense-ibp"]


def test_another_objective_is_kept_with_its_defaults():
    recipe = recipe_with({"objective": IBP}, {"dense": True}, prune={"objective": {"name": "crown_ibp", "eps": 0.1}})
    for kept in (recipe.variants[0].objective, recipe.prune.objective):
        assert kept["kappa"] == {"start": 1.0, "end": 0.0}
    text = dump_recipe(recipe)
    assert parse_recipe(yaml.safe_load(text)) == recipe
    assert "objective" not in yaml.safe_load(text)["variants"][1]  # as recipes were written before variants had one


def test_mistakes_name_the_variant():
    with pytest.raises(InputError) as error:
        recipe_with({"sparsity": 0.5, "objective": {"name": "ibp"}}, {"objective": {"name": "ibpp"}}, {"name": "good"})
    assert str(error.value).startswith("the recipe has one mistake:\n- variants: score-ibp-erk-0.5: ")
    assert "'eps' is missing" in str(error.value)
    assert "score-ibpp-erk-0.95: Unknown objective 'ibpp'. Did you mean 'ibp'?" in str(error.value)
    with pytest.raises(InputError, match="variants.0.objective must be a mapping of keys"):
        recipe_with({"objective": "ibp"})
    with pytest.raises(InputError, match="unknown key 'eps'"):  # the recipe's own objective, benign, has none
        recipe_with({"objective": {"eps": 0.1}})


def test_another_objective_is_another_run():
    old = recipe_with({"objective": IBP, "name": "a"}, {"name": "b"})
    assert differences(old, old) == []
    new = recipe_with({"objective": {**IBP, "eps": 0.2}, "name": "a"}, {"name": "b"})
    assert differences(old, new) == ["variants.a.objective.eps: 0.1 -> 0.2"]
    assert differences(old, recipe_with({"objective": IBP, "name": "a"}, {"objective": IBP, "name": "b"}))


def test_no_finetuning_epochs_means_nobody_is_finetuned():
    variants = {"dense": True}, {"criterion": "magnitude"}, {"criterion": "score"}
    given = [recipe_with(*variants, prune={"epochs": 3}, finetune={"epochs": n}) for n in (0, 2)]
    epochs = [[stage_epochs(r, s, v) for v in r.variants for s in ("prune", "finetune")] for r in given]
    assert epochs == [[0, 0, 0, 0, 3, 0], [0, 5, 0, 5, 3, 2]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A benign network on digits, and what scores find in it against two objectives; nothing is finetuned."""
    torch.set_num_threads(1)
    recipe = parse_recipe(
        {
            **MINIMAL,
            "output": str(tmp_path_factory.mktemp("sub") / "run"),
            "model": {"name": "mlp", "hidden": [64]},
            "initialisation": "default",
            "pretrain": {"epochs": 10, "batch_size": 64, "optimizer": {"name": "adam", "lr": 5e-3}},
            "prune": {"epochs": 12, "batch_size": 64, "ramp": True, "optimizer": {"name": "adam", "lr": 1e-2}},
            "finetune": {"epochs": 0},
            "variants": [
                {"dense": True},
                {"sparsity": 0.8},
                {"sparsity": 0.8, "objective": {**IBP, "kappa": {"end": 0.5}, "warm_up": {"weight": 0.0}}},
                {"sparsity": 0.8, "criterion": "magnitude"},
            ],
        }
    )
    data = load_data("digits", seed=0, validation=0.1)
    run = start_run(recipe, "command", 1, "cpu")
    run_stages(run, data, torch.device("cpu"))
    return run, data


def rows_of(run, name, stage="prune"):
    path = run.stage_folder(stage, name) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_learned_against_the_variants_objective(trained):
    run, _ = trained
    benign, robust = rows_of(run, "score-erk-0.8"), rows_of(run, "score-ibp-erk-0.8")
    assert len(benign) == len(robust) == 12
    assert all("robust_loss" not in row["train"] for row in benign)
    assert [round(row["validation"]["eps"], 6) for row in robust] == [0.1] * 12
    assert robust[0]["train"]["eps"] < robust[-1]["train"]["eps"]  # prune.ramp: true
    masks = [run.load_masks(name) for name in ("score-erk-0.8", "score-ibp-erk-0.8", "magnitude-erk-0.8")]
    assert all(any(not one[key].equal(other[key]) for key in one) for one, other in ((masks[0], masks[1]), masks[1:]))


def test_the_run_says_what_each_stage_minimised(trained):
    run, _ = trained
    stages = json.loads((run.folder / "provenance.json").read_text())["stages"]
    assert stages["pretrain"]["objective"] == stages["score-erk-0.8/prune"]["objective"] == "benign"
    assert stages["score-ibp-erk-0.8/prune"]["objective"] == "ibp"
    assert run.stage_record("prune", "score-ibp-erk-0.8")["objective"]["eps"] == 0.1
    page = write_report(run.folder, run.folder / "page.html").read_text()
    assert "12 epochs of IBP" in page and "10 epochs of benign" in page and "12 epochs of benign" in page


def test_the_robust_subnetwork_is_provable_where_magnitudes_is_not(trained):
    from certifiers import LinfBall, certify
    from certifiers.verdict import summarise

    run, data = trained
    found = {}
    for name in ("dense", "score-ibp-erk-0.8", "magnitude-erk-0.8"):
        verdicts = certify(run.load_model(name), data.test.x[:100], data.test.y[:100], LinfBall(0.1), method="crown")
        found[name] = summarise(verdicts).certified.value
    assert found["score-ibp-erk-0.8"] > max(found["dense"] + 0.05, found["magnitude-erk-0.8"] + 0.1), found


def test_no_weight_moves_after_pretraining(trained):
    run, _ = trained
    before = run.load_model("pretrain").state_dict()
    for variant in run.recipe.variants:
        after = run.load_model(variant.name).state_dict()
        masks = {} if variant.dense else run.load_masks(variant.name)
        for key, tensor in before.items():
            assert after[key].equal(tensor * masks[key] if key in masks else tensor), (variant.name, key)
        assert rows_of(run, variant.name, "finetune") == []


def test_labels_tell_the_objective():
    assert label(Network("x", "score", "erk", 0.9, "crown_ibp")) == "learned scores (CROWN-IBP), 90 %"
    assert label(Network("x", "score", "erk", 0.9, "my_own"), budgets=True) == "learned scores (my_own), ERK, 90 %"
    assert label(Network("x", "score", "erk", 0.9)) == "learned scores, 90 %"


def made_run(folder, sparsities=(0.5, 0.9), objectives=("ibp", "adversarial")):
    """Subnetworks on ten images: the dense one certifies 9, magnitude 1, objective i at sparsity j certifies i+j+2."""
    folder.mkdir()
    config = config_of("subnetworks", eps=(0.1,))
    variants = [{"dense": True, "name": "dense"}]
    for sparsity in sparsities:
        own = [{"name": name, "eps": 0.1} for name in objectives]
        variants += [{"sparsity": sparsity, "budget": "erk", "criterion": "score", "objective": each} for each in own]
        variants.append({"sparsity": sparsity, "budget": "erk", "criterion": "magnitude"})
    config |= {"objective": {"name": "benign"}, "variants": variants, "finetune": {"epochs": 0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text("{}")
    for plan in variants:
        own, sparsity = plan.get("objective"), plan.get("sparsity", 0.0)
        proven = 9 if plan.get("dense") else 1
        if own:
            proven = 2 + objectives.index(own["name"]) + sparsities.index(sparsity)
        name = plan.get("name") or "-".join(
            [plan["criterion"], *([own["name"]] if own else []), "erk", f"{plan['sparsity']:g}"]
        )
        (folder / name / "finetune").mkdir(parents=True)
        record = {"epochs": 0, "selected_epoch": 0, "seconds": 0.0, "sparsity": sparsity_record(sparsity)}
        (folder / name / "finetune" / "stage.json").write_text(json.dumps(record))
        words = ["certified"] * proven + ["falsified"] * (10 - proven)
        rows = [verdict(index, word, 0.1, "crown") for index, word in enumerate(words)]
        write_ledger(folder, name, 0.1, rows, sparsity=sparsity)
    return folder


def test_lines_by_hand(tmp_path):
    run = read_run(made_run(tmp_path / "run"))
    lines = sparsity_lines(run)
    values = {line.label: [(p.sparsity, p.rates["certified"].value) for p in line.points] for line in lines}
    half, most = (round(sparsity_record(s)["total"], 9) for s in (0.5, 0.9))
    rounded = {name: [(round(s, 9), value) for s, value in points] for name, points in values.items()}
    assert rounded == {
        "dense": [(0.0, 0.9)],
        "learned scores (IBP)": [(half, 0.2), (most, 0.3)],
        "learned scores (adversarial)": [(half, 0.3), (most, 0.4)],
        "least magnitude": [(half, 0.1), (most, 0.1)],
    }
    looks = line_styles(lines)
    assert [look.slot for look in looks] == [0, 1, 2, 0] and looks[0].dash and not looks[1].dash and looks[3].dash
    rows = list(csv.DictReader(io.StringIO(sparsity_csv(run))))
    assert len(rows) == 7 and rows[1]["objective"] == "ibp" and float(rows[1]["certified"]) == 0.2


def test_without_own_objectives_colour_tells_the_budget(tmp_path):
    folder = made_run(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["variants"] = [
        {"criterion": criterion, "budget": budget, "sparsity": sparsity}
        for criterion in ("score", "magnitude")
        for budget in ("erk", "uniform")
        for sparsity in (0.5, 0.9)
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for plan in config["variants"]:
        name = f"{plan['criterion']}-{plan['budget']}-{plan['sparsity']:g}"
        path = folder / "certificates" / name / "eps-0.1.jsonl"
        path.unlink(missing_ok=True)
        write_ledger(folder, name, 0.1, [verdict(0, "certified", 0.1, "ibp")], sparsity=plan["sparsity"])
    lines = [line for line in sparsity_lines(read_run(folder)) if len(line.points) > 1 and not line.network.objective]
    assert [line.label for line in lines] == [
        "learned scores, ERK",
        "learned scores, uniform",
        "least magnitude, ERK",
        "least magnitude, uniform",
    ]
    assert [(look.slot, bool(look.dash)) for look in line_styles(lines)] == [
        (1, False),
        (2, False),
        (1, True),
        (2, True),
    ]


def test_the_page_shows_the_curve_and_its_figures(tmp_path):
    folder = made_run(tmp_path / "run")
    page = write_report(folder).read_text()
    part = page[page.index("Accuracy against sparsity") :]
    part = part[: part.index("</section>")]
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", part, re.DOTALL)
    assert len(charts) == 3
    for chart, name in zip(charts, ("Clean", "Attack", "Certified"), strict=True):
        ElementTree.fromstring(chart)
        assert f"{name} accuracy" in chart and "weights removed" in chart and ">90 %<" in chart.replace("\xa0", " ")
    titles = re.findall(r"<title>(.*?)</title>", charts[2])
    assert any("adversarial" in t and "40" in t.split(":")[1] and "at 90" in t for t in titles), titles
    assert "No network was finetuned" in part and "objective that scores were learned against" in part
    assert (folder / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sparsity.csv").read_text().count("\n") == 8


def test_smoothing_certificates_have_charts_of_their_own(tmp_path):
    folder = made_run(tmp_path / "run")
    for name, radius in (("dense", 0.1), ("score-ibp-erk-0.5", 0.6), ("score-ibp-erk-0.9", 0.3)):
        smooth(folder, name, [radius, 0.6, None, None])
    run = read_run(folder)
    assert [panel.key for panel in sparsity_panels(run)] == ["clean", "attack", "certified", "smoothed", "radius"]
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(sparsity_csv(run)))}
    assert [rows[name]["smoothed_0.25_at_0.25"] for name in rows] == ["0.25", "0.5", "0.5", "", "", "", ""]
    page = write_report(folder).read_text()
    assert "Certified at ℓ2 radius 0.25" in page and "Accuracy under noise of 0.25" in page


def test_the_axis_begins_where_the_pruned_networks_do(tmp_path):
    ticks = {}
    for name, sparsities in (("wide", (0.5, 0.9)), ("high", (0.9, 0.99))):
        page = write_report(made_run(tmp_path / name, sparsities=sparsities)).read_text().replace("\xa0", " ")
        chart = re.search(r'<svg class="chart" role="img" aria-label="Clean accuracy against weights.*?</svg>', page)[0]
        ticks[name] = re.findall(r'text-anchor="middle">([\d.]+ %)<', chart)
    assert ticks == {"wide": ["0 %", "50 %", "80 %", "90 %"], "high": ["90 %", "95 %", "99 %"]}


def test_one_sparsity_makes_no_curve(tmp_path):
    folder = made_run(tmp_path / "run", sparsities=(0.5,))
    assert sparsity_lines(read_run(folder)) == []
    assert "Accuracy against sparsity" not in write_report(folder).read_text()
    assert not (folder / "sparsity.png").exists()


def test_many_networks_are_drawn_against_sparsity_alone(tmp_path):
    few = made_run(tmp_path / "few")
    many = made_run(tmp_path / "many", sparsities=(0.1, 0.3, 0.5, 0.7, 0.8, 0.9))
    assert not many_networks(read_run(few)) and many_networks(read_run(many))
    assert "Certified accuracy against eps" in write_report(few).read_text()
    page = write_report(many).read_text()
    assert "Certified accuracy against eps" not in page and page.index("against sparsity") < page.index(">Summary<")
    assert not (many / "curves.png").exists() and (many / "curves.csv").exists()


def test_the_shipped_recipe():
    from pathlib import Path

    path = Path(__file__).parent.parent / "configs" / "robust_subnetworks.yaml"
    recipe = load_recipe(path)
    assert recipe.objective["name"] == "benign" and recipe.initialisation == "default"
    assert recipe.finetune.epochs == 0 and recipe.prune.ramp and recipe.variant("dense").dense
    learned = {
        variant.objective["name"] for variant in recipe.variants if variant.criterion == "score" and variant.objective
    }
    assert {"adversarial", "crown_ibp", "mixtrain", "stability"} <= learned
    assert {variant.sparsity for variant in recipe.variants if variant.criterion == "magnitude"} == {
        variant.sparsity for variant in recipe.variants if not variant.dense
    }


def test_side_by_side_tells_the_objectives_of_scores_apart(tmp_path):
    (family,) = families_of([read_run(made_run(tmp_path / "run"))])
    (table,) = family.tables
    found = {(gap.label, gap.first.sparsity): gap.cells.rates["certified"].value for gap in table.gaps}
    assert found == {
        ("learned scores (IBP) − least magnitude", 0.5): pytest.approx(0.1),
        ("learned scores (adversarial) − least magnitude", 0.5): pytest.approx(0.2),
        ("learned scores (IBP) − least magnitude", 0.9): pytest.approx(0.2),
        ("learned scores (adversarial) − least magnitude", 0.9): pytest.approx(0.3),
    }
    assert table.gap(0.9, "erk") is None  # none of them is by the family's own objective
