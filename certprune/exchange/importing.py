"""A network from elsewhere as a run, so that it is certified, smoothed, compacted and reported like one made here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.config import Recipe
from certprune.exchange.hydra import ARCHITECTURES, SCORES, load_hydra
from certprune.exchange.states import read_checkpoint, state_of
from certprune.masks import sparsity
from certprune.models import build_model
from certprune.recipes import parse_recipe
from certprune.runs import Run, start_run
from certprune.storage import read_json, write_json, write_tensors

NAME = "imported"  # of the run's one network
# Images (channels, height, width) and classes of the data sets whose names say them.
SHAPES = {
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "imagenet": ((3, 224, 224), 1000),
    "mnist": ((1, 28, 28), 10),
    "mnist-5k": ((1, 28, 28), 10),
    "svhn": ((3, 32, 32), 10),
    "tiny-imagenet": ((3, 64, 64), 200),
}


def import_run(
    checkpoint: Path,
    folder: Path,
    model: str | None = None,
    data: str = "cifar10",
    keep: float | None = None,
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    changes: Sequence[str] = (),
    command: str = "",
) -> Run:
    """Make the run ``folder`` out of a checkpoint: of HYDRA, with masks of torch.nn.utils.prune, or a plain state dict.

    Its recipe trains nothing, and its networks, the pretrained one and the variant "imported", are both the one that
    came. ``changes``: of that recipe, ``"model.mean=0.5"``. For the others see :func:`load_checkpoint`;
    ``input_shape`` and ``classes`` follow from ``data`` where its name says them.

    Raises InputError, with nothing written, for what :func:`load_checkpoint` refuses, for a recipe that cannot be, and
    for a folder that holds something.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is there already. Nothing was changed. Give another folder with -o, or delete it.")
    content = read_checkpoint(checkpoint)
    recipe = _recipe(folder, ARCHITECTURES.get(model, model) or _told_model(content, checkpoint), data, changes)
    usual = SHAPES.get(recipe.data.name, (None, None))
    shape, classes = input_shape or usual[0], classes or usual[1]
    if shape is None or classes is None:
        raise InputError(
            f"How large the images of {recipe.data.name} are, and how many classes they have, must be said: give "
            "--shape, e.g. 3,32,32, and --classes."
        )
    net = load_checkpoint(checkpoint, recipe.model.name, keep, shape, classes, content, **recipe.model.options)
    run = start_run(recipe, command, torch.get_num_threads(), "cpu")
    provenance = run.folder / "provenance.json"
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    write_json(provenance, read_json(provenance) | {"imported": {"file": checkpoint.name, "sha256": digest}})
    for stage, variant in (("pretrain", "pretrain"), ("finetune", NAME)):
        _save(run, stage, variant, net, shape, classes)
    return run


def load_checkpoint(
    path: Path,
    model: str,
    keep: float | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    content: Any = None,
    **options,
) -> nn.Module:
    """The plain network ``model`` (see :func:`build_model`) with the weights in a file, in evaluation mode.

    ``keep``: of HYDRA's masked checkpoints, see :func:`load_hydra`. ``content``: the file's, where it is read already.
    In other checkpoints parameters must have the names that they have in ``model``; a weight may come as
    `weight_orig` and `weight_mask`, and is 0 where the mask is.

    Raises InputError for a file that holds no such network.
    """
    content = read_checkpoint(path) if content is None else content
    state = state_of(content)
    if state is None:
        raise InputError(f"{path} holds no network: it should be a dict of tensors, or have one under state_dict.")
    scored = any(key.endswith(SCORES) for key in state)
    if scored or (content.get("arch") in ARCHITECTURES and model in ARCHITECTURES.values()):
        return load_hydra(path, keep, input_shape, classes, model, **options)
    if keep is not None:
        raise InputError(f"keep is for HYDRA's checkpoints with scores, but {path} has none: it is taken as it is.")
    net = build_model(model, input_shape, classes, **options)
    weights, expected = _masked_weights(state, path), net.state_dict()
    for name, value in expected.items():
        if name.startswith("normalise."):
            weights.setdefault(name, value)
    _check_named_alike(expected, weights, model, path)
    net.load_state_dict(weights)
    return net.eval()


def _told_model(content: Any, path: Path) -> str:
    arch = content.get("arch") if isinstance(content, Mapping) else None
    if isinstance(arch, str) and arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    raise InputError(
        f"{path} does not say which network it holds. Give --model, e.g. vgg16_bn (certprune models lists them)."
    )


def _masked_weights(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`weight_orig` times `weight_mask` as the weight; everything else as it is."""
    weights = {key: value for key, value in state.items() if not key.endswith(("_orig", "_mask"))}
    for key, value in state.items():
        if key.endswith("_orig"):
            name = key.removesuffix("_orig")
            mask = state.get(f"{name}_mask")
            if mask is None or mask.shape != value.shape or not ((mask == 0) | (mask == 1)).all():
                raise InputError(f"{path}: {key} needs a {name}_mask of its shape that holds only 0 and 1.")
            weights[name] = torch.where(mask.bool(), value, 0.0)
        elif key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" not in state:
            raise InputError(f"{path}: {key} masks nothing, there is no {key.removesuffix('_mask')}_orig.")
    return weights


def _check_named_alike(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], model: str, path: Path) -> None:
    for name in [*expected, *(name for name in found if name not in expected)]:
        shapes = [tuple(part[name].shape) if name in part else "nothing" for part in (expected, found)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{path} holds another network than {model} for these images and classes: {name} should be "
                f"{shapes[0]}, but is {shapes[1]}. Give --model, --shape and --classes; a network of your own goes by "
                "--model package.module:callable."
            )
        if not torch.isfinite(found[name]).all():
            raise InputError(f"{path} holds numbers that are not finite (in {name}). Get it again.")


def _recipe(folder: Path, model: str, data: str, changes: Sequence[str]) -> Recipe:
    """That of a run which trains nothing."""
    content = {
        "name": folder.name,
        "output": str(folder),
        "data": {"name": data},
        "model": {"name": model},
        "objective": {"name": "benign"},
        **{stage: {"epochs": 0} for stage in ("pretrain", "prune", "finetune")},
        "variants": [{"dense": True, "name": NAME}],
    }
    recipe = parse_recipe(content, "the recipe of what is imported", changes)
    if recipe.output != str(folder):
        raise InputError(f"The folder is given by -o ({folder}), but output={recipe.output} came too. Leave one out.")
    if [variant.name for variant in recipe.variants] != [NAME]:
        raise InputError("A run of what is imported has one variant. Add others when it is there: certprune run RUN.")
    return recipe


def _save(run: Run, stage: str, variant: str, net: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    place = run.stage_folder(stage, variant)
    place.mkdir(parents=True)
    write_tensors(place / "model.safetensors", net.state_dict())
    record = {
        "stage": stage,
        "variant": None if stage == "pretrain" else variant,
        "objective": run.recipe.objective,
        "epochs": 0,
        "selected_epoch": 0,
        "seconds": 0.0,
        "sparsity": sparsity(net).as_dict(),
        "validation": {},
        "input_shape": list(shape),
        "classes": classes,
    }
    write_json(place / "stage.json", record)
