"""``state.pt``: all that a stage needs in order to go on after its last whole epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.optimizers import Optimizers
from certprune.storage import plain, read_state, write_state

FORMAT = "certprune training state 1"


@dataclass(frozen=True)
class State:
    """After ``epoch`` whole epochs: their rows, and the weights of the best of them (None: none to choose yet)."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None

    def after(self, row: dict[str, Any], model: nn.Module) -> State:
        """The state one epoch on; ``model`` holds the weights that the epoch ended with."""
        best = {k: v.detach().clone() for k, v in model.state_dict().items()} if row["selected"] else self.best
        return State(self.epoch + 1, [*self.history, plain(row)], best)


def save_state(
    folder: Path,
    stage: str,
    state: State,
    model: nn.Module,
    optimizer: Optimizers,
    objective: Mapping[str, Any] | None = None,
) -> None:
    """Write ``state.pt`` atomically; ``objective``: the settings of what is minimised."""
    write_state(
        folder / "state.pt",
        {
            "format": FORMAT,
            "stage": stage,
            "objective": json.dumps(objective),
            "epoch": state.epoch,
            "history": json.dumps(state.history),
            "model": model.state_dict(),
            "best": state.best,
            "optimizer": optimizer.state_dict(),
        },
    )


def load_state(
    folder: Path,
    stage: str,
    epochs: int,
    model: nn.Module,
    optimizer: Optimizers,
    device: torch.device,
    objective: Mapping[str, Any] | None = None,
) -> State | None:
    """Restore ``model`` and ``optimizer`` from ``state.pt``, or None if there is none.

    Raises :class:`InputError`, with model and file untouched, if the file is damaged or was written by
    another stage, under another ``objective``, by another network or by something else. What objective is
    not compared where the file, of old, or the caller does not say.
    """
    path = folder / "state.pt"
    if not path.exists():
        return None
    found = read_state(path, device)
    if found.get("format") != FORMAT or found.get("stage") != stage or not 0 < found.get("epoch", 0) <= epochs:
        raise _foreign(path, f"it is not the state of a {stage} stage of {epochs} epochs")
    try:
        _check_objective(path, json.loads(found.get("objective", "null")), objective)
        history = json.loads(found["history"])
        chosen = any(row["selected"] for row in history)
        for part in ("model", "best") if chosen else ("model",):
            _check_shapes(path, found.get(part), model.state_dict())
        optimizer.load_state_dict(found["optimizer"])
    except InputError:  # it says all already
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _foreign(path, str(error)) from error
    model.load_state_dict(found["model"])
    return State(found["epoch"], history, found["best"])


def discard_state(folder: Path) -> None:
    """Remove ``state.pt``: the stage is complete."""
    (folder / "state.pt").unlink(missing_ok=True)


def _check_objective(path: Path, found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> None:
    if found is None or expected is None:
        return
    expected = json.loads(json.dumps(expected))  # as it will be read back
    # A setting that the file does not know was added since, and has what held before as its default.
    wrong = [key for key, value in found.items() if expected.get(key) != value]
    if wrong:
        wrong = ["name"] if "name" in wrong else wrong  # the settings of another objective say nothing here
        now, then = ([f"{key} {of.get(key)!r}" for key in wrong] for of in (expected, found))
        raise _foreign(
            path, f"the objective should have {', '.join(now)}, but the file was trained with {', '.join(then)}"
        )


def _check_shapes(path: Path, found: Any, expected: dict[str, Tensor]) -> None:
    if not isinstance(found, dict):
        raise _foreign(path, "its weights are missing")
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            shapes = [tuple(part[name].shape) if name in part else "nothing" for part in (expected, found)]
            raise _foreign(path, f"{name} should be {shapes[0]}, but the file has {shapes[1]}")


def _foreign(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} does not belong to this training: {reason}. Nothing was changed. Delete the file to start "
        f"this "
        "stage again from its first epoch, or give another output=."
    )
