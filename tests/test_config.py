"""Recipes: what is accepted, what is filled in, and how mistakes are told."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from certifiers.errors import InputError
from certprune.recipes import differences, dump_recipe, load_recipe, parse_recipe

CONFIGS = Path(__file__).parent.parent / "configs"
SMOKE = CONFIGS / "smoke.yaml"
MINIMAL = {"name": "r", "data": {"name": "digits"}, "model": {"name": "mlp"}, "objective": {"name": "benign"}}


def minimal(**changes):
    return parse_recipe({**MINIMAL, **changes})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_survive_the_round_trip(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe  # readable by any YAML reader


def test_everything_but_four_keys_has_a_default():
    recipe = minimal()
    assert recipe.output == "runs/r" and recipe.seed == 0 and recipe.pretrain.ramp and not recipe.finetune.ramp
    for key in MINIMAL:
        with pytest.raises(InputError, match=f"{key} is missing"):
            parse_recipe({k: v for k, v in MINIMAL.items() if k != key})


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        minimal().seed = 3


def test_variant_names_say_what_they_are():
    recipe = minimal(variants=[{"sparsity": 0.99}, {"criterion": "random", "budget": "uniform", "sparsity":
    0.5},
                               {"dense": True}, {"name": "mine"}])  # fmt: skip
    assert [v.name for v in recipe.variants] == ["score-erk-0.99", "random-uniform-0.5", "dense", "mine"]


def test_overrides_reach_into_mappings_and_lists():
    recipe = load_recipe(SMOKE, ["pretrain.epochs=2", "variants.0.sparsity=0.9", "certify.count=null", "name=x"])
    assert recipe.pretrain.epochs == 2
    assert [v.name for v in recipe.variants] == ["score-erk-0.9", "magnitude-erk-0.8"]
    assert recipe.certify.count is None and recipe.output == "runs/x"
    assert recipe.pretrain.batch_size == load_recipe(SMOKE).pretrain.batch_size  # what stands beside it stays


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("2/255", 2 / 255), ("-.5E2", -50.0), ("3", 3), ("0.25", 0.25)]
)
def test_numbers_as_people_write_them(text, number):
    recipe = load_recipe(SMOKE, [f"model.x={text}"])
    assert recipe.model.options["x"] == number and type(recipe.model.options["x"]) is type(number)


def test_dates_and_versions_are_not_taken_for_fractions():
    recipe = load_recipe(SMOKE, ["model.x=1/2/3", "model.y=runs/2"])
    assert recipe.model.options["x"] == "1/2/3" and recipe.model.options["y"] == "runs/2"


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "deeper").mkdir()
    child = tmp_path / "deeper" / "child.yaml"
    (tmp_path / "base.yaml").write_text(
        "name: base\ndata: {name: digits}\nmodel: {name: mlp, hidden: [8]}\nobjective: {name: benign}\n"
        "pretrain: {epochs: 3, schedule: {name: cosine, final: 0.5}}\n"
    )
    child.write_text("extends: ../base.yaml\nname: child\npretrain: {batch_size: 7, schedule: {name: step}}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.pretrain.epochs, recipe.pretrain.batch_size) == ("child", 3, 7)
    assert recipe.model.options == {"hidden": [8]}
    assert recipe.pretrain.schedule.name == "step"  # another name replaces: `final` means nothing to it


def test_circles_of_extends_are_found(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match="circle"):
        load_recipe(tmp_path / "a.yaml")


def test_a_stage_may_change_the_objective():
    recipe = minimal(
        objective={"name": "crown_ibp", "eps": 0.1, "fusion": False},
        prune={"objective": {"eps": 0.2}},
        finetune={"objective": {"name": "benign"}},
    )
    settings = [recipe.stage_objective(stage) for stage in ("pretrain", "prune", "finetune")]
    assert [s["name"] for s in settings] == ["crown_ibp", "crown_ibp", "benign"]
    assert (settings[0]["eps"], settings[1]["eps"]) == (0.1, 0.2)
    assert settings[0]["fusion"] is settings[1]["fusion"] is False and "fusion" not in settings[2]


def test_the_objective_is_kept_with_its_defaults():
    assert load_recipe(SMOKE).objective["kappa"] == {"start": 1.0, "end": 0.0}
    assert "kappa" in yaml.safe_load(dump_recipe(load_recipe(SMOKE)))["objective"]


def test_the_eps_grid_defaults_to_the_objective():
    assert minimal(objective={"name": "crown_ibp", "eps": 0.3}).eps_grid == (0.3,)
    assert minimal().eps_grid == ()
    assert minimal(certify={"eps": [0.1, 0.2]}).main_eps == 0.2
    assert minimal(objective={"name": "ibp", "eps": 0.1}, certify={"eps": [0.1, 0.2]}).main_eps == 0.1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.epoch=3", ["pretrain.epoch ", "Did you mean epochs", "batch_size"]),
        ("optimiser=1", ["optimiser", "Allowed"]),
        ("pretrain.optimizer.nam=sgd", ["pretrain.optimizer.nam ", "Did you mean name"]),
        ("pretrain.schedule={name: step, final: 1}", ["pretrain.schedule.final ", "milestones"]),
        ("variants.0.sparse=0.5", ["variants.0.sparse ", "sparsity"]),
        ("pretrain.epochs=three", ["pretrain.epochs", "whole number", '"three"']),
        ("pretrain.epochs=-1", ["pretrain.epochs", "at least 0", "-1"]),
        ("seed=true", ["seed", "whole number", "true"]),
        ("seed=1.5", ["seed", "whole number", "1.5"]),
        (
            "variants.0.sparsity=1.2",
            ["variants.0.sparsity", "less than 1", "1.2", "fraction of weights removed"],
        ),
        ("variants.0.sparsity=-0.1", ["variants.0.sparsity", "at least 0"]),
        ("variants.0.criterion=magnitud", ["criterion", "magnitude"]),
        ("variants.0.budget=erg", ["budget", "erk"]),
        ("variants=[{dense: true, sparsity: 0.5}]", ["variants.0", "dense"]),
        ("variants=[{sparsity: 0.5}, {sparsity: 0.5}]", ["score-erk-0.5", "another name"]),
        ("variants=[{name: pretrain}]", ["variants", "pretrain"]),
        ("variants.9.sparsity=0.5", ["list of 2", "'9'"]),
        ("pretrain.optimizer.name=adagrad", ["pretrain.optimizer.name", "adam, sgd", '"adagrad"']),
        ("pretrain.optimizer.lr=0", ["pretrain.optimizer.lr", "greater than 0"]),
        ("pretrain.optimizer.lr=.nan", ["pretrain.optimizer.lr", "NaN"]),
        ("certify.eps=0.1", ["certify.eps", "a list"]),
        ("certify.eps=[-0.1]", ["certify.eps.0", "at least 0", "-0.1"]),
        ("certify.methods=[crwn]", ["certify.methods", "crown"]),
        ("objective.eps=-0.1", ["objective", "eps", "-0.1"]),
        ("objective.name=nothing", ["objective", "nothing", "crown_ibp"]),
        ("prune.objective={name: nothing}", ["prune", "nothing"]),
        ("device=gpu", ["device", "cpu, cuda"]),
        ("name=a/b", ["name", "a/b"]),
        ("data.validation=1.5", ["data.validation", "less than 1"]),
        ("name.x=1", ["name", "no keys below"]),
        ("nonsense", ["key=value"]),
        ("seed=[", ["YAML"]),
    ],
)
def test_a_mistake_names_the_key_and_what_was_expected(override, words):
    with pytest.raises(InputError) as caught:
        load_recipe(SMOKE, [override])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_all_mistakes_come_at_once():
    with pytest.raises(InputError) as caught:
        load_recipe(SMOKE, ["pretrain.epochs=x", "finetune.foo=1", "variants.0.sparsity=1.2"])
    assert len(re.findall(r"^- ", str(caught.value), re.M)) == 3
    assert "3 mistakes" in str(caught.value) and str(SMOKE) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "key: value"),
        ("name: a\nname: b\n", "twice"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
        ("extends: 3\n", "extends"),
    ],
)
def test_broken_files(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        load_recipe(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_differences_are_those_that_change_weights():
    old = load_recipe(SMOKE)

    def changed(*overrides):
        return differences(old, load_recipe(SMOKE, overrides))

    assert changed() == []
    assert changed("certify.count=3", "output=elsewhere", "threads=2", "device=cpu") == []
    assert changed("pretrain.epochs=9", "objective.eps=0.3") == [
        "objective.eps: 0.02 -> 0.3",
        "pretrain.epochs: 4 -> 9",
    ]
    more = [
        {"criterion": "score", "sparsity": 0.8},
        {"criterion": "magnitude", "sparsity": 0.8},
        {"dense": True},
    ]
    assert changed(f"variants={yaml.safe_dump(more, default_flow_style=True)}") == []  # one more does no harm
    fewer = changed("variants=[{dense: true}]")
    assert any("variants.score-erk-0.8" in line for line in fewer)
