"""Checkpoints in files: dicts of tensors that are read without executing anything."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certifiers.errors import InputError


def read_checkpoint(path: Path) -> Any:
    """What a file of `torch.save` holds, tensors and plain values alone; or the tensors of a `.safetensors` file.

    Raises InputError for a file that is not there, is damaged, or holds anything else.
    """
    if path.suffix == ".safetensors":
        from certprune.storage import read_tensors

        return read_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no checkpoint {path}. Give the path of a file with a network's weights.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} cannot be read as tensors and plain values ({reason}). Nothing in it was executed. Get the file "
            "again; if you trust it, load it yourself and save its state_dict alone, or "
            "{'arch': ..., 'state_dict': ...}."
        ) from error


def state_of(content: Any) -> dict[str, Tensor] | None:
    """The state dict in a checkpoint (itself, or its ``state_dict``), names without "module."; None if it has none."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        return None
    return {key.removeprefix("module."): value for key, value in state.items()}
