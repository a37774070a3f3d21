"""pretrain -> prune -> finetune: what is trained in each, from which weights, and for how long.

A stage reads its input from the files of the stage before it, never from memory, and is complete once its
``stage.json`` stands. So it makes no difference to any weight where a run was cut off.

The comparison is fair in epochs: every network trains as long. A variant whose prune stage trains nothing (magnitude
in one shot, say, and the dense yardstick) gets that stage's epochs on top of its finetuning; in the others the prune
stage trains scores, weights, or both, as the criterion and the schedule have it. A recipe with ``finetune.epochs: 0``
asks what pruning alone finds in the pretrained weights: then nobody is finetuned.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from certifiers.errors import InputError, UnsupportedLayer
from certprune.batch_norm import synchronised
from certprune.config import Recipe, VariantSettings
from certprune.data.batches import Batches
from certprune.initialisation import initialise
from certprune.masker import Loss, Masker
from certprune.masks import (
    apply_masks,
    freeze_masks,
    mask_state,
    materialize,
    score_parameters,
    sparsify,
    sparsity,
    weight_parameters,
)
from certprune.models import build_model
from certprune.objectives import build_objective, needs_bounds
from certprune.optimizers import Group
from certprune.parallel import own_device, world
from certprune.progress import Progress
from certprune.pruning import SCHEDULES, select_layers, weight_gradients
from certprune.pruning.criteria import Gradients
from certprune.pruning.schedules import OneShot
from certprune.runs import Run
from certprune.speed import check_speed
from certprune.storage import write_json, write_tensors
from certprune.training import Plan, TrainResult, discard_state, train

STAGES = ("pretrain", "prune", "finetune")


def use_machine(recipe: Recipe) -> torch.device:
    """Set the number of threads and return the device, as the recipe asks."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"The recipe asks for device: cuda, but this torch ({torch.__version__}) sees no CUDA device. "
            "Write device=cpu or device=auto, or install a CUDA build of torch."
        )
    cuda = recipe.device != "cpu" and torch.cuda.is_available()
    return own_device(torch.device("cuda" if cuda else "cpu"))


def new_model(recipe: Recipe, data: Any) -> nn.Module:
    """The recipe's network with its first weights, a function of the seed."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model.name, data.shape, data.classes, **recipe.model.options)
    initialise(model, recipe.initialisation, recipe.seed)
    return model


def check_network(recipe: Recipe, data: Any) -> None:
    """Raise :class:`InputError` now, not after training, if the network cannot be built, pruned, bounded."""
    model = new_model(recipe, data)
    for settings in _objectives(recipe).values():
        check_speed(build_objective(settings), recipe.speed)
    _check_bounds(recipe, model, data.shape)
    for variant in recipe.variants:
        if not variant.dense:
            # Any gradients will do: how many weights each layer keeps, and where they may lie, is what can go wrong.
            layers = select_layers(model, recipe.prune.layers, recipe.prune.exclude)
            _sparsify(recipe, variant, copy.deepcopy(model), weight_gradients(model, list(layers), ()))


def _objectives(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The settings of all stages' objectives, one of each name."""
    stages = [("pretrain", None), *((stage, v) for stage in ("prune", "finetune") for v in recipe.variants)]
    return {settings["name"]: settings for place in stages for settings in [recipe.stage_objective(*place)]}


def _check_bounds(recipe: Recipe, model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise InputError if something in the recipe needs bounds of a layer whose bounds are not known."""
    from certifiers import bounds

    wanted = {name for name in recipe.certify.methods if recipe.eps_grid and name in bounds.METHODS}
    needing = [f"certify.methods ({', '.join(sorted(wanted))})"] if wanted else []
    needing += [
        f"the objective {name}" for name, of in _objectives(recipe).items() if needs_bounds(build_objective(of))
    ]
    if not needing:
        return
    try:
        bounds.trace(model, shape)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(
            f"{' and '.join(needing)} cannot be had of the model {recipe.model.name}. {error} Without bounds a network "
            "can be trained by benign, adversarial, trades, free and the objectives of smoothing, and certified by "
            "smoothing; certify: {methods: [attack]} attacks without proving."
        ) from error


def run_stages(
    run: Run,
    data: Any,
    device: torch.device,
    stages: Sequence[str] = STAGES,
    progress: Progress | None = None,
) -> None:
    """Do ``stages`` of every variant, skipping what is complete and going on with what was cut off."""
    progress = progress or Progress()
    if "pretrain" in stages and not _done(run, "pretrain", "pretrain"):
        pretrain(run, data, device, progress)
    for variant in run.recipe.variants:
        if "prune" in stages and not variant.dense and not _done(run, "prune", variant.name):
            prune(run, variant, data, device, progress)
        if "finetune" in stages and not _done(run, "finetune", variant.name):
            finetune(run, variant, data, device, progress)


def pretrain(run: Run, data: Any, device: torch.device, progress: Progress) -> None:
    """Train the dense network from its first weights."""
    model = new_model(run.recipe, data)
    groups = [Group(weight_parameters(model), run.recipe.pretrain.optimizer)]
    _train(run, "pretrain", "pretrain", model, groups, data, device, progress)


def prune(run: Run, variant: VariantSettings, data: Any, device: torch.device, progress: Progress) -> None:
    """Mask the pretrained network; train the scores, the weights or both, as criterion and schedule have it.

    Unless weights are trained, they, biases and batch normalisation (running statistics included) stay as
    pretraining left them.
    """
    recipe, model = run.recipe, run.load_model("pretrain").to(device)
    gradients = _gradients(recipe, variant, model, data) if variant.pruning().rank.gradients else None
    _sparsify(recipe, variant, model, gradients)
    settings = recipe.prune
    masker = Masker(model, variant.pruning(recipe.seed), _schedule(recipe, variant), settings.layers, settings.exclude)
    groups = [Group(score_parameters(model), settings.optimizer)] if variant.trains[0] else []
    if variant.trains[1]:
        groups.append(Group(weight_parameters(model), settings.weights))
    _train(run, "prune", variant.name, model, groups, data, device, progress, masker)


def finetune(run: Run, variant: VariantSettings, data: Any, device: torch.device, progress: Progress) -> None:
    """Train weights and biases under fixed masks (the dense variant: without masks)."""
    if variant.dense:
        model = run.load_model("pretrain")
    else:
        model = run.load_model(variant.name, "prune")
        apply_masks(model, run.load_masks(variant.name))
    groups = [Group(weight_parameters(model), run.recipe.finetune.optimizer)]
    _train(run, "finetune", variant.name, model, groups, data, device, progress)


def stage_epochs(recipe: Recipe, stage: str, variant: VariantSettings | None) -> int:
    """The epochs of a stage; see the module's docstring for who gets the prune stage's epochs."""
    if variant is None:
        return recipe.pretrain.epochs
    trained = any(variant.trains)
    if stage == "prune":
        return recipe.prune.epochs if trained else 0
    if recipe.finetune.epochs == 0:
        return 0
    return recipe.finetune.epochs + (0 if trained else recipe.prune.epochs)


def _sparsify(
    recipe: Recipe, variant: VariantSettings, model: nn.Module, gradients: Mapping[str, Gradients] | None
) -> None:
    sparsify(
        model,
        sparsity=variant.sparsity,
        criterion=variant.criterion,
        budget=variant.budget,
        layers=recipe.prune.layers,
        exclude=recipe.prune.exclude,
        seed=recipe.seed,
        floor=variant.floor,
        pattern=variant.pattern,
        gradients=gradients,
    )


def _schedule(recipe: Recipe, variant: VariantSettings) -> OneShot:
    settings = recipe.prune
    options = {"gradual": settings.growth.model_dump(), "iterative": {"rounds": settings.rounds}}
    return SCHEDULES[variant.schedule](every=settings.every, **options.get(variant.schedule, {}))


def _gradients(recipe: Recipe, variant: VariantSettings, model: nn.Module, data: Any) -> dict[str, Gradients]:
    """Of the prune stage's objective at its final eps and weights, over the first batches of a seeded order."""
    objective = build_objective(recipe.stage_objective("prune", variant))
    torch.manual_seed(recipe.seed)  # objectives may draw noise
    batches = Batches(data, recipe.prune.batch_size, next(model.parameters()).device)
    chosen = islice(batches.epoch(torch.Generator().manual_seed(recipe.seed)), recipe.prune.batches)

    def losses() -> Iterator[Loss]:
        for x, y in chosen:
            yield lambda net, x=x, y=y: objective(net, x, y, 1.0)[0]

    layers = select_layers(model, recipe.prune.layers, recipe.prune.exclude)
    return weight_gradients(copy.deepcopy(model).requires_grad_(True), list(layers), losses())


def _done(run: Run, stage: str, name: str) -> bool:
    """Whether the stage is complete; if so, the state that a kill may have left behind is removed."""
    complete = run.is_complete(stage, name)
    if complete and world().leads:
        discard_state(run.stage_folder(stage, name))
    return complete


def _train(
    run: Run,
    stage: str,
    name: str,
    model: nn.Module,
    groups: Sequence[Group],
    data: Any,
    device: torch.device,
    progress: Progress,
    masker: Masker | None = None,
) -> None:
    recipe, folder = run.recipe, run.stage_folder(stage, name)
    variant = None if stage == "pretrain" else recipe.variant(name)
    settings = recipe.stage_objective(stage, variant)
    plan = Plan(
        stage=stage,
        title="pretrain" if stage == "pretrain" else f"{name} · {stage}",
        settings=getattr(recipe, stage),
        epochs=stage_epochs(recipe, stage, variant),
        seed=recipe.seed,
        speed=recipe.speed,
        batch_statistics=stage != "prune" or variant.trains[1],
        objective=settings,
        device=device,
    )
    with synchronised(model) if recipe.sync_batch_norm else contextlib.nullcontext():
        result = train(model, groups, build_objective(settings), data, plan, folder, progress, masker)
    freeze_masks(model)
    if world().leads:
        _save(run, stage, name, model, settings, result, data)
    world().wait()  # the next stage reads what was saved


def _save(
    run: Run, stage: str, name: str, model: nn.Module, objective: dict[str, Any], result: TrainResult, data: Any
) -> None:
    """Write a stage's weights, then its record, which makes it complete."""
    folder = run.stage_folder(stage, name)
    write_tensors(folder / "model.safetensors", materialize(model).state_dict())
    masks = mask_state(model)
    if masks:
        write_tensors(folder / "masks.safetensors", masks)
    run.record_stage(stage, name, result.seconds, len(result.history), objective["name"])
    record = {
        "stage": stage,
        "variant": None if stage == "pretrain" else name,
        "objective": objective,
        "epochs": len(result.history),
        "selected_epoch": result.selected_epoch,
        "seconds": result.seconds,
        "sparsity": sparsity(model).as_dict(),
        "validation": result.validation,
        "input_shape": list(data.shape),
        "classes": data.classes,
    }
    write_json(folder / "stage.json", record)
    discard_state(folder)
