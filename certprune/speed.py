"""One training step as the recipe's `speed` asks for it: in several parts, in bfloat16, compiled.

Training steps only: validation and certification call the objective on the model itself, in float32. What a step does
follows from the state at the start of its process's first epoch alone, so a resumed run still ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.bounds import trace
from certifiers.errors import InputError
from certprune.batch_norm import is_synchronised
from certprune.objectives import needs_bounds
from certprune.progress import Progress
from certprune.stage_settings import SpeedSettings

BACKEND = "inductor"  # torch.compile's

Figures = dict[str, Tensor]
Losses = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, Figures]]


class Step:
    """`step(x, y, progress)` adds the gradient of the batch's loss to the parameters' `.grad`.

    It gives the figures of each part of the batch, its detached loss among them as "loss"; parts are of equal size.
    With `compile` the network is compiled, or the whole loss where that is made of bounds; if this fails, `progress`
    is told once, and steps are taken as they are.

    Raises InputError for a `speed` that the objective does not allow.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Losses,
        speed: SpeedSettings | None = None,
        progress: Progress | None = None,
    ):
        self.model, self.objective, self.speed = model, objective, speed or SpeedSettings()
        self.progress = progress or Progress()
        check_speed(objective, self.speed)
        self.losses, self.compiled, self.tried = self._plain(), False, not self.speed.compile

    def __call__(self, x: Tensor, y: Tensor, progress: float) -> list[Figures]:
        if not self.tried:
            self._compile(x, y, progress)
        try:
            return self._take(self.losses, x, y, progress)
        except Exception as error:  # other values of progress are compiled when they come: that may fail, too
            if not self.compiled or isinstance(error, InputError):
                raise
            self._give_up(error)
            return self._take(self.losses, x, y, progress)

    def _take(self, losses: Losses, x: Tensor, y: Tensor, progress: float) -> list[Figures]:
        found, parts = [], self.speed.accumulate
        for part in range(parts):
            loss, figures = losses(self.model, x[part::parts], y[part::parts], progress)
            (loss / parts).backward()
            found.append({"loss": loss.detach(), **figures})
        return found

    def _plain(self, wrap: Callable[[Callable], Callable] | None = None) -> Losses:
        """The objective, where the network's forward pass is wrapped, and in bfloat16 if asked for."""
        if wrap is None and not self.speed.bf16:
            return self.objective
        forward = self.model.forward if wrap is None else wrap(self.model.forward)
        return partial(_through, partial(_in_bfloat16, forward) if self.speed.bf16 else forward, self.objective)

    def _compiled(self) -> Losses:
        if not needs_bounds(self.objective):  # attacks call autograd, which cannot be compiled: the network alone is
            return self._plain(partial(torch.compile, backend=BACKEND, dynamic=False))
        objective = self.objective
        if not hasattr(objective, "at"):
            raise RuntimeError(f"{objective.name} decides in every step what it bounds")

        def at(model: nn.Module, x: Tensor, y: Tensor, ramp: Tensor, ended: bool):
            return objective.at(model, x, y, 1.0 if ended else ramp)

        compiled = torch.compile(at, backend=BACKEND, fullgraph=True, dynamic=False)

        def losses(model: nn.Module, x: Tensor, y: Tensor, progress: float):
            ramp = objective.ramp(progress)  # a tensor: numbers are compiled anew, or guarded by sums that round
            return compiled(model, x, y, torch.tensor(ramp, dtype=x.dtype, device=x.device), ramp == 1.0)

        return losses

    def _compile(self, x: Tensor, y: Tensor, progress: float) -> None:
        """Compile on this batch; parameters, buffers, and the random state stay as they are."""
        self.tried, self.compiled = True, True
        torch._dynamo.reset()  # as in a new process, so that it makes no difference where a run was cut off
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                if is_synchronised(self.model):  # one process that fails here would leave the others waiting
                    raise RuntimeError("sync_batch_norm lets processes talk within a step")
                if needs_bounds(self.objective):
                    trace(self.model, tuple(x.shape[1:]))  # cannot be done inside
                self.losses = self._compiled()
                self._take(self.losses, x, y, progress)
        except Exception as error:  # of many kinds, from the tracer to the C++ compiler
            self._give_up(error)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            self.model.zero_grad()
            if hasattr(self.objective, "begin_epoch"):
                self.objective.begin_epoch()  # the first step of a process is the first of an epoch

    def _give_up(self, error: Exception) -> None:
        self.losses, self.compiled = self._plain(), False
        self.model.zero_grad()
        reason = " ".join((str(error) or type(error).__name__).split())
        self.progress.note(
            f"speed.compile: this step cannot be compiled here ({reason[:200].strip()}). Training goes on without."
        )


def check_speed(objective: Any, speed: SpeedSettings) -> None:
    """Raise InputError unless the objective can be trained so."""
    name = getattr(objective, "name", "this objective")
    if speed.bf16 and needs_bounds(objective):
        raise InputError(
            f"speed.bf16 is for objectives that look at logits, but {name} is made of bounds: the rounding of bfloat16 "
            "(0.4 %) is wider than many of the boxes that they are about. Leave out speed.bf16, or train by benign, "
            "adversarial, trades, free or an objective of smoothing."
        )
    if speed.accumulate > 1 and hasattr(objective, "replays"):
        raise InputError(
            f"speed.accumulate is {speed.accumulate}, but {name} carries its perturbation from one pass over a batch "
            "to the next, which parts of it would mix up. Leave out speed.accumulate and lower batch_size, or train "
            "by adversarial."
        )


def check_parts(batch: int, speed: SpeedSettings) -> None:
    """Raise InputError unless a batch (of one process) can be parted evenly."""
    if batch % speed.accumulate:
        raise InputError(
            f"A batch of {batch} images (of each process) cannot be parted into speed.accumulate = {speed.accumulate} "
            "equal parts. Give a batch_size that can be (the training set must hold as many images)."
        )


def _in_bfloat16(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The network's layers by autocast, the logits in float32: losses are as exact as ever."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return forward(x).float()


def _through(forward: Callable, objective: Losses, model: nn.Module, x: Tensor, y: Tensor, progress: float):
    """The objective's loss where `model(x)` is `forward(x)`."""
    model.forward = forward  # of this object alone, and gone before anyone copies it
    try:
        return objective(model, x, y, progress)
    finally:
        del model.forward
