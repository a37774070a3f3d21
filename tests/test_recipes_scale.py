"""The recipes of the paper's scale: each loads, says what it should, and runs two steps of every stage when shrunk."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from certprune.certifying import certify_run
from certprune.config import Recipe
from certprune.data import Data, Split
from certprune.data.images import ByteImages
from certprune.recipes import dump_recipe, load_recipe, parse_recipe
from certprune.runs import start_run
from certprune.stages import check_network, run_stages

CONFIGS = Path(__file__).parent.parent / "configs"
FOLDERS = ("cifar10", "svhn", "imagenet", "mnist_full")
RECIPES = sorted(path for folder in FOLDERS for path in (CONFIGS / folder).glob("*.yaml"))
SHAPES = {"cifar10": (3, 32, 32), "svhn": (3, 32, 32), "mnist": (1, 28, 28), "imagenet": (3, 224, 224)}
NARROW = {"vgg16_bn": 0.05, "wrn_28_4": 0.1, "cnn7": 0.05, "cnn_small": 0.25, "cnn_large": 0.1}
FULL = ("cifar10/smoothing_wrn_28_4", "cifar10/crown_ibp_cnn_large", "imagenet/free_resnet50")
# What makes a step of these cheap.
CHEAP = {
    "mixtrain": {"images": 1, "validation_images": 1, "probability": 1.0},
    "free": {"replays": 2},
    "trades": {"steps": 2},
    "sabr": {"steps": 2},
}


def ids(path):
    return str(path.relative_to(CONFIGS))


def synthetic(recipe: Recipe, count: int, shape=None) -> Data:
    """Noise of the shape of the recipe's images, with every class of a few."""
    shape, classes = shape or SHAPES[recipe.data.name], 10
    generator = torch.Generator().manual_seed(0)

    def split(n):
        pixels = torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)
        return Split(ByteImages(pixels), torch.arange(n) % classes)

    return Data(recipe.data.name, classes, shape, split(count), split(4), split(2), augment=("crop", "flip"))


def shrunk(path: Path, output: Path) -> Recipe:
    """The recipe with a narrow network, batches of 4, and one epoch a stage."""
    recipe = load_recipe(path)
    name = recipe.model.name
    small = ["width_per_group", 2] if name == "resnet50" else ["width", NARROW[name]]
    words = [f"model.{small[0]}={small[1]}", f"output={output}", "threads=1", "device=cpu", "certify.count=2"]
    words += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=4")]
    words += [f"objective.{key}={value}" for key, value in CHEAP.get(recipe.objective["name"], {}).items()]
    words += ["certify.attack_steps=2", "certify.attack_restarts=1"]
    if name == "resnet50":  # two steps leave the running statistics of 53 layers behind He's start
        words.append("initialisation=default")
    recipe = load_recipe(path, words)
    return recipe.model_copy(update={"variants": recipe.variants[:2]})  # the rest differ in numbers alone


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_says_what_its_row_is(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.name == f"{path.parent.name}_{path.stem}"
    assert f"certprune run configs/{path.parent.name}/{path.name}" in path.read_text()
    sparsities = {(v.criterion, v.sparsity) for v in recipe.variants if not v.dense}
    assert sparsities == {(c, s) for c in ("score", "magnitude") for s in (0.9, 0.95, 0.99)}
    assert recipe.variants[0].dense and len({v.budget for v in recipe.variants[1:]}) == 1
    assert len(path.read_text().splitlines()) < 25


def test_every_row_of_the_tables_is_there():
    found = {ids(path).removesuffix(".yaml"): load_recipe(path) for path in RECIPES}
    models = {"vgg16": "vgg16_bn", "wrn_28_4": "wrn_28_4", "cnn_small": "cnn_small", "cnn_large": "cnn_large"}
    expected = {
        **{(kind, net): net for kind in ("adversarial", "smoothing") for net in ("vgg16", "wrn_28_4")},
        **{(kind, net): net for kind in ("mixtrain", "crown_ibp") for net in ("cnn_small", "cnn_large")},
    }
    objectives = {"adversarial": ("trades", 8 / 255), "smoothing": ("stability", None)}
    for data in ("cifar10", "svhn"):
        for kind, net in expected:
            recipe = found[f"{data}/{kind}_{net}"]
            assert (recipe.data.name, recipe.model.name) == (data, models[net])
            name, eps = objectives.get(kind, (kind, 2 / 255))
            assert (recipe.objective["name"], recipe.objective.get("eps")) == (name, eps)
            assert {v.budget for v in recipe.variants} >= {"uniform"}
    assert found["imagenet/free_resnet50"].objective["eps"] == 4 / 255
    assert {found[f"mnist_full/cnn7_ibp_{eps}"].objective["eps"] for eps in (0.1, 0.3)} == {0.1, 0.3}
    assert [found[f"cifar10/cnn7_sabr_{n}"].eps_grid for n in (2, 8)] == [(2 / 255,), (8 / 255,)]


def test_no_recipe_rounds_its_eps():
    for path in CONFIGS.rglob("*.yaml"):
        assert not re.search(r"0\.00[78]|0\.031|0\.0156", re.sub("#.*", "", path.read_text())), path


def quick(path):
    """One of each kind without `slow`; those on SVHN differ from those on CIFAR-10 in the data alone."""
    first = path.parent.name == "cifar10" and not path.stem.endswith(("wrn_28_4", "cnn_large", "_8"))
    return path if first else pytest.param(path, marks=pytest.mark.slow)


@pytest.mark.parametrize("path", [quick(path) for path in RECIPES], ids=ids)
def test_two_steps_of_every_stage(path, tmp_path):
    recipe = shrunk(path, tmp_path / "run")
    data = synthetic(recipe, 8, (3, 32, 32) if recipe.data.name == "imagenet" else None)
    check_network(recipe, data)
    run = start_run(recipe, "test", 1, "cpu")
    run_stages(run, data, torch.device("cpu"))
    for variant in recipe.variants:
        record = run.stage_record("finetune", variant.name)
        assert record["validation"]["loss"] is not None
    assert run.stage_record("finetune", recipe.variants[1].name)["sparsity"]["total"] == pytest.approx(0.9, abs=0.02)
    masks = run.load_masks(recipe.variants[1].name)
    weights = run.load_model(recipe.variants[1].name).state_dict()
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
    if recipe.model.name in ("vgg16_bn", "cnn_small") and recipe.eps_grid:
        certify_run(run, data, torch.device("cpu"))
        assert all(run.ledger_path(v.name, recipe.eps_grid[0]).exists() for v in recipe.variants)


@pytest.mark.slow
def test_imagenet_at_its_size(tmp_path):
    recipe = shrunk(CONFIGS / "imagenet" / "free_resnet50.yaml", tmp_path / "run")
    data = dataclasses.replace(synthetic(recipe, 8), augment=("flip",))
    recipe = recipe.model_copy(update={"variants": recipe.variants[1:2]})
    run_stages(start_run(recipe, "test", 1, "cpu"), data, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if ids(p)[:-5] in FULL], ids=ids)
def test_networks_of_full_size_build_and_prune(path):
    recipe = load_recipe(path)
    check_network(recipe, synthetic(recipe, 1))
