"""The only epoch loop. It trains the parameters it is given and keeps the weights of the best epoch.

What an epoch does follows from the seed, the stage's name and the epoch's number alone: the order of the
batches, the random state at its start, the learning rate and the objective's progress are pure functions of
them, and everything else that an epoch needs stands in ``state.pt``. So a run that was killed and resumed
ends with the same weights, to the bit, as one that was not (on one machine, with one thread setting).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.checkpoints import State, discard_state, load_state, save_state
from certprune.data.batches import Batches, in_order
from certprune.masker import Masker
from certprune.optimizers import Group, Optimizers
from certprune.parallel import World, world
from certprune.progress import Progress, epoch_note
from certprune.speed import Step, check_parts
from certprune.stage_settings import Schedule, SpeedSettings, StageSettings
from certprune.storage import write_json_lines

Objective = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, dict[str, Tensor]]]
BATCH_NORMS = nn.modules.batchnorm._BatchNorm

__all__ = ["TrainResult", "discard_state", "learning_rate", "train", "validate"]


@dataclass(frozen=True)
class TrainResult:
    """What a stage's training gave; the model itself is left holding the selected weights.

    ``history`` has one entry an epoch (see :func:`train`); ``selected_epoch`` counts from 1, and is 0 if the
    stage has no epochs; ``seconds`` is the time spent in epochs, earlier processes' epochs included.
    """

    history: list[dict[str, Any]]
    selected_epoch: int
    seconds: float
    validation: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """One stage's training, below the recipe: what :func:`train` needs besides the model and the images.

    ``stage`` seeds the batches together with ``seed``, so variants trained from one recipe see the same
    batches. ``objective``: its settings, which a state must have been trained with for the stage to go on
    from it (None: any). ``batch_statistics``: whether batch normalisation learns; if not, it stays in evaluation mode
    throughout, so that running statistics do not move while only scores should.
    """

    stage: str
    settings: StageSettings
    epochs: int
    title: str = ""
    seed: int = 0
    batch_statistics: bool = True
    speed: SpeedSettings = SpeedSettings()
    objective: Mapping[str, Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def train(
    model: nn.Module,
    groups: Sequence[Group],
    objective: Objective,
    data: Any,
    plan: Plan,
    folder: Path,
    progress: Progress | None = None,
    masker: Masker | None = None,
) -> TrainResult:
    """Train the parameters of ``groups``, each by its own optimizer, and nothing else of ``model``, on ``data.train``;
    select the epoch on ``data.validation``. ``masker`` moves the masks.

    The selected epoch is the one with the lowest validation loss at progress 1, that is at the final eps and
    weights, whatever the ramp is doing; an epoch that ends short of the final sparsity is never selected. After every
    epoch ``folder`` gets ``state.pt``, from which the next call goes on, and ``metrics.jsonl``: ``{epoch, step, lr,
    train: {loss, ...}, validation: {loss, ...}, seconds, selected}`` a line, where ``selected`` says that the epoch
    was the best so far. ``state.pt`` is left for the caller to remove (:func:`discard_state`) once the stage's
    weights are safe.

    An objective with ``replays`` is given each minibatch so many times in a row; an epoch keeps its number of
    steps, so the minibatches that there is no time for sit it out.

    Raises :class:`InputError` if the loss or a gradient is not finite (the state of the last whole epoch is
    kept), or if ``state.pt`` is damaged, another stage's or another objective's.
    """
    progress, among = progress or Progress(), world()
    _lay_out(model, plan)
    trained = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    if plan.epochs == 0:
        return _untrained(model, objective, data, plan, folder, progress)
    batches = Batches(data, plan.settings.batch_size, plan.device)
    among.check_batch(batches.size)
    check_parts(batches.size // among.size, plan.speed)
    take = Step(model, objective, plan.speed, progress)
    optimizer = Optimizers(groups)
    state = load_state(folder, plan.stage, plan.epochs, model, optimizer, plan.device, plan.objective) or State()
    among.as_leader(model)
    steps, size = batches.steps, batches.steps * batches.size
    progress.begin(plan.title or plan.stage, plan.epochs * size, done=state.epoch * size)
    for epoch in range(state.epoch, plan.epochs):
        began = time.perf_counter()
        chosen = batches.epoch(_seed_epoch(plan, epoch), getattr(objective, "replays", 1))
        if hasattr(objective, "begin_epoch"):
            objective.begin_epoch()  # what it carries from step to step does not stand in state.pt
        row = _epoch(model, take, optimizer, among.parts(chosen), steps, epoch, plan, progress, masker)
        among.average_statistics(model)
        row["validation"] = validate(model, objective, data.validation, batches.size, plan.device)
        row["seconds"] = time.perf_counter() - began
        ranks = [_rank(entry) for entry in (*state.history, row) if _settled(entry, masker, plan.epochs * steps)]
        row["selected"] = bool(ranks) and all(ranks[-1] < rank for rank in ranks[:-1])
        state = state.after(row, model)
        if among.leads:
            save_state(folder, plan.stage, state, model, optimizer, plan.objective)
            write_json_lines(folder / "metrics.jsonl", state.history)
        progress.epoch(epoch + 1, plan.epochs, row)
    model.load_state_dict(state.best)
    model.to(memory_format=torch.contiguous_format)
    if among.leads:
        write_json_lines(folder / "metrics.jsonl", state.history)
    selected = [row for row in state.history if row["selected"]][-1]
    summary = epoch_note({"validation": selected["validation"]})
    progress.end(f"epoch {selected['epoch']} selected: {summary}")
    seconds = sum(row["seconds"] for row in state.history)
    return TrainResult(state.history, selected["epoch"], seconds, selected["validation"])


@torch.no_grad()
def validate(model: nn.Module, objective: Objective, split: Any, batch: int, device: torch.device) -> dict[str, float]:
    """Mean loss and figures of ``objective`` at progress 1 over ``split``, in evaluation mode."""
    model.eval()
    means, among = _Means(), world()
    for x, y in in_order(split, batch, device, (among.rank, among.size)):
        loss, figures = objective(model, x, y, 1.0)
        means.add({"loss": loss, **figures}, len(y))
    return means.values(among)


def learning_rate(schedule: Schedule, base: float, progress: float) -> float:
    """The learning rate at ``progress``, the fraction of the stage's steps that are done."""
    if schedule.name == "cosine":
        return base * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule.name == "step":
        return base * schedule.factor ** sum(progress >= milestone for milestone in schedule.milestones)
    return base


def _lay_out(model: nn.Module, plan: Plan) -> None:
    """Move the model to the device, its weights in the layout asked for.

    Images stay as they are, for what an objective draws at random in their shape follows their layout.
    """
    model.to(plan.device)
    if plan.speed.channels_last:
        model.to(memory_format=torch.channels_last)


def _epoch(model, take, optimizer, batches, steps, epoch, plan, progress, masker) -> dict[str, Any]:
    """One pass over the ``steps`` pairs (x, y) of ``batches``; the epoch's row without its validation."""
    model.train()
    if not plan.batch_statistics:
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
    means, among = _Means(), world()
    for index, (x, y) in enumerate(batches):
        step, of = epoch * steps + index, plan.epochs * steps
        ramp = step / of if plan.settings.ramp else 1.0
        if masker is not None and masker.begin_step(step, of, lambda net, at=(x, y, ramp): take.objective(net, *at)[0]):
            optimizer.forget()
        if masker is not None and masker.pruning.rank.gradients:
            among.as_leader(model)  # each process saw its own part of the batch
        optimizer.set_rate(
            learning_rate(plan.settings.schedule, 1.0, masker.progress(step, of) if masker else step / of)
        )
        optimizer.zero_grad()
        parts = take(x, y, ramp)
        among.average_gradients([parameter for group in optimizer.groups for parameter in group.parameters])
        norms = optimizer.norms()
        loss = _finite_loss(torch.stack([part["loss"] for part in parts]).mean(), norms, epoch, index, plan)
        if plan.settings.clip_gradient is not None:
            optimizer.clip(plan.settings.clip_gradient, norms)
        optimizer.step()
        for part in parts:
            means.add(part, len(y) // len(parts))
        progress.advance(len(y), f"loss {loss:.4g}")
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * steps,
        "lr": optimizer.rate,
        "train": means.values(among),
    }


class _Means:
    """Means over images. A figure may be absent from some batches: its mean is over those that have it."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor], count: int) -> None:
        for name, value in figures.items():
            # float64, and no .item(): a GPU need not wait for each figure of each batch
            self.sums[name] = self.sums.get(name, 0.0) + value.double() * count
            self.counts[name] = self.counts.get(name, 0) + count

    def values(self, among: World) -> dict[str, float]:
        """The means over the images of all processes."""
        found = among.gather({name: (float(total), self.counts[name]) for name, total in self.sums.items()})
        names = dict.fromkeys(name for figures in found for name in figures)
        pairs = {name: [figures[name] for figures in found if name in figures] for name in names}
        return {name: sum(total for total, _ in p) / sum(count for _, count in p) for name, p in pairs.items()}


def _untrained(model, objective, data, plan: Plan, folder: Path, progress: Progress) -> TrainResult:
    """The result of no epochs: the weights as they came, judged on the validation split."""
    if world().leads:
        write_json_lines(folder / "metrics.jsonl", [])
    validation = validate(model, objective, data.validation, plan.settings.batch_size, plan.device)
    progress.begin(plan.title or plan.stage, 0)
    progress.end(f"nothing to train: {epoch_note({'validation': validation})}")
    return TrainResult([], 0, 0.0, validation)


def _seed_epoch(plan: Plan, epoch: int) -> torch.Generator:
    """Seed torch for the epoch and return the generator of the order of its images."""
    digest = hashlib.sha256(f"{plan.seed}/{plan.stage}/{epoch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.Generator().manual_seed(int.from_bytes(digest[8:15], "big"))


def _finite_loss(loss: Tensor, norms: Sequence[Tensor], epoch: int, index: int, plan: Plan) -> float:
    """The step's loss; InputError if it, or the gradient's norm, is not finite."""
    loss, norm = torch.stack([loss.double(), sum(norms).double()]).tolist()  # a GPU is waited for but once
    if math.isfinite(loss) and math.isfinite(norm):
        return loss
    what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
    kept = f"The state after epoch {epoch} is kept" if epoch else "No epoch was finished"
    raise InputError(
        f"The {what} of {plan.title or plan.stage} became {value} in epoch {epoch + 1}, step {index + 1}. "
        f"{kept}, and no "
        "weights were spoilt. Try a smaller learning rate, a smaller clip_gradient, a longer ramp (more "
        "epochs), "
        "or initialisation: ibp, with another output=."
    )


def _settled(row: Mapping[str, Any], masker: Masker | None, steps: int) -> bool:
    """Whether the epoch ended with the final sparsity: once one has, all later ones do."""
    return masker is None or masker.settled(row["step"] - 1, steps)


def _rank(row: Mapping[str, Any]) -> float:
    """The validation loss for comparing epochs; one that is no number is worse than any."""
    loss = row["validation"]["loss"]
    return math.inf if loss is None or math.isnan(loss) else loss
