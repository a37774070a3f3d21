"""The run folder: what lies where, whose it is, and how its networks are loaded.

A run folder describes itself (``config.yaml``, ``provenance.json``) and is never written over by another
recipe: :func:`start_run` refuses one whose recipe would train other weights, and one that another process is
working in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certifiers.errors import InputError
from certprune import provenance
from certprune.config import Recipe
from certprune.recipes import differences, dump_recipe, load_recipe
from certprune.storage import read_json, read_tensors, write_json, write_text

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Run:
    """A run folder and the recipe that made it."""

    folder: Path
    recipe: Recipe

    def stage_folder(self, stage: str, variant: str = "pretrain") -> Path:
        """Where a stage's weights lie; pretraining belongs to no variant."""
        return self.folder / "pretrain" if stage == "pretrain" else self.folder / variant / stage

    def is_complete(self, stage: str, variant: str = "pretrain") -> bool:
        """Whether the stage has ended: its ``stage.json`` is written last of all."""
        return (self.stage_folder(stage, variant) / "stage.json").exists()

    def last_stage(self, variant: str) -> str | None:
        """The latest complete stage of ``variant``, or None."""
        stages = ("pretrain",) if variant == "pretrain" else ("finetune", "prune")
        return next((stage for stage in stages if self.is_complete(stage, variant)), None)

    def stage_record(self, stage: str, variant: str = "pretrain") -> dict[str, Any]:
        """The contents of ``stage.json``; :class:`InputError` if the stage is not complete."""
        folder = self.stage_folder(stage, variant)
        if not self.is_complete(stage, variant):
            raise InputError(
                f"The stage {folder.relative_to(self.folder)} of the run {self.folder} is not complete yet. "
                f"Finish it first: certprune run {self.folder}"
            )
        return read_json(folder / "stage.json")

    def ledger_path(self, variant: str, eps: float) -> Path:
        """The ledger of ``variant`` at ``eps``."""
        return self.folder / "certificates" / variant / f"eps-{eps:g}.jsonl"

    def load_model(self, variant: str = "pretrain", stage: str | None = None) -> nn.Module:
        """The network of ``variant`` after ``stage`` (default: its last complete one), plain and in eval
        mode.

        Raises :class:`InputError` if the stage is not complete, the file is damaged, is another network's, or
        holds numbers that are not finite.
        """
        stage = stage or self.last_stage(variant) or ("pretrain" if variant == "pretrain" else "finetune")
        return load_weights(self.recipe, self.stage_record(stage, variant), self.stage_folder(stage, variant))

    def load_masks(self, variant: str) -> dict[str, Any]:
        """Which weights ``variant`` keeps, by the layer's name, as boolean tensors."""
        masks = read_tensors(self.stage_folder("prune", variant) / "masks.safetensors")
        return {name: mask.bool() for name, mask in masks.items()}

    def record_stage(self, stage: str, variant: str, seconds: float, epochs: int, objective: str) -> None:
        """Note a stage's time, and the name of what it minimised, in ``provenance.json``."""
        path = self.folder / "provenance.json"
        record = read_json(path)
        key = stage if stage == "pretrain" else f"{variant}/{stage}"
        record["stages"][key] = {"seconds": seconds, "epochs": epochs, "objective": objective}
        write_json(path, record)


def open_run(path: str | Path) -> Run:
    """The run in the folder ``path``; :class:`InputError` if it is none."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} is not a run folder: it has no config.yaml. Give the folder that certprune run made, "
            "e.g. runs/demo."
        )
    return Run(folder, load_recipe(folder / "config.yaml"))


def check_startable(recipe: Recipe) -> None:
    """Raise :class:`InputError` unless the recipe's folder is free or holds a run of it; writes nothing."""
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, but a run needs a folder. Nothing was changed. Give another output=.")
    if not (folder / "config.yaml").exists():
        ours = {
            ".lock",
            "provenance.json",
            ".provenance.json.tmp",
            ".config.yaml.tmp",
        }  # a kill while starting
        if folder.exists() and any(path.name not in ours for path in folder.iterdir()):
            raise InputError(
                f"{folder} is there already and is not a run folder (it has no config.yaml). Nothing was "
                f"changed. "
                "Give another output=, or move away what is there."
            )
        return
    changed = differences(open_run(folder).recipe, recipe)
    if changed:
        raise InputError(
            f"The run {folder} was made by another recipe, and going on would mix the two: "
            f"{'; '.join(changed)}. "
            f"Nothing was changed. Give another output=, take these settings back, or delete {folder} to "
            f"train anew."
        )


def start_run(recipe: Recipe, command: str, threads: int, device: str) -> Run:
    """Make the run folder of ``recipe``, or go on in it and note that; see :func:`check_startable`."""
    check_startable(recipe)
    folder = Path(recipe.output)
    config, text = folder / "config.yaml", dump_recipe(recipe)
    if not config.exists():
        # Provenance first: a folder with a config.yaml counts as a run, and must be whole.
        write_json(folder / "provenance.json", provenance.describe(recipe.seed, command, threads, device))
        write_text(config, text)
        return Run(folder, recipe)
    record = read_json(folder / "provenance.json")
    again = {"time": provenance.now(), "command": command, "threads": threads, "device": device}
    record["resumed"] = [*record.get("resumed", []), {**again, "git_commit": provenance.git_commit()}]
    write_json(folder / "provenance.json", record)
    if config.read_text() != text:
        write_text(config, text)
    return Run(folder, recipe)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the run folder for this process; the system lets go of it however the process ends.

    Raises :class:`InputError` if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another process is working in {folder}. Wait for it, end it, or give another output=."
            ) from error
        yield


def load(path: str | Path) -> nn.Module:
    """A trained network of a run, plain (no masks) and in evaluation mode.

    ``path`` is a variant's folder (``runs/demo/score-erk-0.95``: its last complete stage), a stage's folder,
    or a ``model.safetensors`` in one; or a file of ``certprune compact``, wherever it lies. Raises
    :class:`InputError` if it is none of these, or cannot be trusted.
    """
    path = Path(path)
    if path.is_file() and path.name != "model.safetensors":
        from certprune.compact import load_compacted

        return load_compacted(path)
    folder = path.parent if path.name == "model.safetensors" else path
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Give a variant's or a stage's folder inside a run.")
    root = next((p for p in (folder, *folder.resolve().parents) if (p / "config.yaml").is_file()), None)
    if root is None:
        raise InputError(f"{path} is not inside a run: no folder above it has a config.yaml.")
    run = open_run(root)
    inside = folder.resolve().relative_to(root.resolve()).parts
    variants = [variant.name for variant in run.recipe.variants]
    if inside == ("pretrain",):
        return run.load_model()
    if inside and len(inside) <= 2 and inside[0] in variants:
        return run.load_model(inside[0], inside[1] if len(inside) == 2 else None)
    known = ", ".join(str(root / name) for name in ("pretrain", *variants))
    raise InputError(f"{path} names no network of the run {root}. Give one of: {known}.")


def load_weights(recipe: Recipe, record: dict[str, Any], folder: Path) -> nn.Module:
    """The plain network that ``record`` (a ``stage.json``) describes, with the weights in ``folder``."""
    import torch

    from certprune.models import build_model

    path = folder / "model.safetensors"
    weights = read_tensors(path)
    model = build_model(recipe.model.name, tuple(record["input_shape"]), record["classes"], **recipe.model.options)
    expected = model.state_dict()
    for name in sorted(weights.keys() | expected.keys()):
        if name not in weights or name not in expected or weights[name].shape != expected[name].shape:
            shapes = [tuple(part[name].shape) if name in part else "nothing" for part in (expected, weights)]
            raise InputError(
                f"{path} holds another network than the recipe's {recipe.model.name}: {name} should be "
                f"{shapes[0]}, but the file has {shapes[1]}. Restore the file, or delete {folder} to train "
                "that stage anew."
            )
        if not torch.isfinite(weights[name]).all():
            raise InputError(
                f"{path} holds numbers that are not finite (in {name}), so nothing can be proven about it. "
                f"Restore the file, or delete {folder} to train that stage anew."
            )
    model.load_state_dict(weights)
    return model.eval()
