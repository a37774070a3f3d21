"""Every objective through every stage, for a few real steps; and every shipped recipe loads, resolves and builds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from certprune.data import load_data
from certprune.masks import sparsify
from certprune.objectives import OBJECTIVES, build_objective
from certprune.recipes import dump_recipe, load_recipe, parse_recipe
from certprune.runs import start_run
from certprune.stages import check_network, new_model, run_stages

from .test_objectives import ALL

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"cifar10", "svhn", "imagenet", "mnist_full", "parts"}  # test_recipes_scale.py
FOUND = (path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ELSEWHERE)
RECIPES = sorted(path for path in FOUND if path.stem != "base")
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "mnist-5k": (1, 28, 28), "fashion-mnist": (1, 28, 28)}
SMALLER = {"free": {"replays": 2}}  # an epoch below has but two steps
STAGE = {"epochs": 3, "batch_size": 64}


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits", seed=0)
    few = dataclasses.replace(data.train, x=data.train.x[:128], y=data.train.y[:128])
    return dataclasses.replace(data, train=few)


@pytest.fixture(scope="module", params=sorted(ALL))
def done(request, digits, tmp_path_factory):
    """A run of one objective: pretrained, pruned by scores, finetuned; two steps an epoch."""
    name = request.param
    recipe = parse_recipe(
        {
            "name": name,
            "output": str(tmp_path_factory.mktemp(name) / "run"),
            "threads": 1,
            "data": {"name": "digits"},
            "model": {"name": "mlp", "hidden": [32], "batch_norm": True},
            "objective": {**ALL[name], **SMALLER.get(name, {})},
            "pretrain": {**STAGE, "optimizer": {"name": "adam", "lr": 1e-2}},
            "prune": {**STAGE, "optimizer": {"name": "sgd", "lr": 1.0}},
            "finetune": {**STAGE, "optimizer": {"name": "adam", "lr": 3e-3}},
            "variants": [{"criterion": "score", "sparsity": 0.8, "name": "small"}],
        }
    )
    run = start_run(recipe, "test", 1, "cpu")
    run_stages(run, digits, torch.device("cpu"))
    return run


@torch.no_grad()
def loss_of(run, model, data, stage):
    """The stage's loss on one fixed batch at progress 1, as validation computes it."""
    torch.manual_seed(0)
    objective = build_objective(run.recipe.stage_objective(stage))
    return objective(model.eval(), data.train.x[:64], data.train.y[:64], 1.0)[0].item()


def before(run, data, stage):
    """The network that the stage begins with."""
    if stage == "pretrain":
        return new_model(run.recipe, data)
    if stage == "finetune":
        return run.load_model("small", "prune")
    model = run.load_model("pretrain")
    sparsify(model, sparsity=0.8, criterion="score", budget="erk", seed=run.recipe.seed)
    return model


@pytest.mark.parametrize("stage", ["pretrain", "prune", "finetune"])
def test_a_few_steps_of_every_stage_lower_the_loss(done, digits, stage):
    after = done.load_model("small" if stage != "pretrain" else "pretrain", stage)
    assert loss_of(done, after, digits, stage) < loss_of(done, before(done, digits, stage), digits, stage)


def test_each_stage_trains_what_it_should(done):
    first = done.load_model("pretrain").state_dict()
    pruned, tuned = (done.load_model("small", stage).state_dict() for stage in ("prune", "finetune"))
    masks = done.load_masks("small")
    for key, tensor in first.items():  # scores alone: neither weights, biases nor running statistics
        assert pruned[key].equal(tensor * masks[key] if key in masks else tensor)
    assert any("running_mean" in key and not tuned[key].equal(first[key]) for key in first)
    for key, mask in masks.items():
        assert (tuned[key][~mask] == 0).all() and not tuned[key].equal(pruned[key])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_loads_and_its_networks_build(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    data = SimpleNamespace(shape=SHAPES[recipe.data.name], classes=10)
    check_network(recipe, data)
    for stage in ("pretrain", "prune", "finetune"):
        build_objective(recipe.stage_objective(stage))
    # What the comment says can be typed, and the name tells where the recipe lies.
    words = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert all((ROOT / named).exists() for named in re.findall(r"configs/[\w/]+\.yaml", words))
    if path.parent.name in ("mnist", "fashion_mnist"):
        assert recipe.name == f"{path.parent.name}_{path.stem}"
        assert f"configs/{path.parent.name}/{path.name}" in words or "make " in words


@pytest.mark.parametrize("folder", ["mnist", "fashion_mnist"])
def test_every_objective_has_its_recipe(folder):
    found = {path.stem: load_recipe(path) for path in RECIPES if path.parent.name == folder}
    assert set(OBJECTIVES) <= set(found)
    for name in OBJECTIVES:
        assert found[name].objective["name"] == name
        # Smoothing is certified by smoothing; an eps would belong to another guarantee.
        smoothed = "sigma" in found[name].objective
        assert bool(found[name].eps_grid) != smoothed and (found[name].certify.smoothing is not None) == smoothed
