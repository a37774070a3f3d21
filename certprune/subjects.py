"""What a command certifies or exports: a variant of a run, or a compacted network in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from certifiers.errors import InputError
from certprune.runs import Run


@dataclass(frozen=True)
class Subject:
    """A network, plain and in eval mode; ``ledgers`` is the folder of the ledgers about it."""

    name: str
    model: nn.Module
    sparsity: float
    ledgers: Path


def subject(run: Run, network: str | Path | Subject) -> Subject:
    """``network`` of ``run``: a variant's name (as finetuning left it) or "pretrain", or the path of a compacted file.

    The ledgers of a file are beside it, in ``NAME-certificates/``: they are about another network than the run's.
    Raises InputError if the network is not there yet, or is not for the run's data.
    """
    if isinstance(network, Subject):
        return network
    stage = "pretrain" if network == "pretrain" else "finetune"
    if isinstance(network, Path):
        return _compacted(run, network)
    record = run.stage_record(stage, network)
    model = run.load_model(network, stage)
    return Subject(network, model, record["sparsity"]["total"], run.folder / "certificates" / network)


def _compacted(run: Run, path: Path) -> Subject:
    from certprune.compact import read_compacted

    found = read_compacted(path)
    record = run.stage_record("pretrain")
    shape, classes = tuple(record["input_shape"]), record["classes"]
    if (found.input_shape, found.classes) != (shape, classes):
        raise InputError(
            f"{path} takes inputs of shape {found.input_shape} and knows {found.classes} classes, but the data of the "
            f"run {run.folder} has {shape} and {classes}. Give the run that it was made of."
        )
    name = path.name.removesuffix(".gz").removesuffix(".safetensors")
    return Subject(name, found.model, found.origin.get("sparsity", 0.0), path.with_name(f"{name}-certificates"))


def chosen_networks(names: Sequence[str], files: Sequence[Path] | None, variants: Sequence[str] | None) -> list:
    """The files that ``--network`` gave, else the variants' ``names``; InputError for both options at once."""
    if files and variants:
        raise InputError("--network and --variant both say what to take. Give one of them.")
    return list(files) if files else list(names)
