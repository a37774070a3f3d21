"""What moves the masks while a stage trains: growing sparsity, budgets that follow the scores, rewinding.

All of it is a function of the step and of what stands in the model's state, so a stage that was cut off and resumed
goes on the same, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from certprune.masks import mask_of, materialize, rank_weights
from certprune.pruning.gradients import weight_gradients
from certprune.pruning.layers import select_layers
from certprune.pruning.plan import Pruning
from certprune.pruning.schedules import OneShot

Loss = Callable[[nn.Module], Tensor]


class Masker:
    """Moves the masks of a model that `sparsify` made by `pruning`, as `schedule` says.

    Make it before a resumed state is restored: weights rewind to those that the model has now.
    """

    def __init__(
        self,
        model: nn.Module,
        pruning: Pruning,
        schedule: OneShot,
        layers: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
    ):
        self.model, self.pruning, self.schedule = model, pruning, schedule
        self.layers = select_layers(model, layers, exclude)
        masks = {id(tensor) for layer in self.layers.values() for tensor in _tensors(mask_of(layer))}
        weights = [(name, tensor) for name, tensor in _named_tensors(model) if id(tensor) not in masks]
        self.origin = {name: tensor.detach().clone() for name, tensor in weights if schedule.rewinding}

    def begin_step(self, step: int, steps: int, loss: Loss) -> bool:
        """Set the masks for this step of the stage's `steps`; `loss` is the coming batch's, as a function of the model.

        True if weights were rewound, so that what an optimizer remembers of them is void.
        """
        if not self.schedule.moves(step, steps):
            return False
        sparsity = self.schedule.sparsity(self.pruning.sparsity, step, steps)
        if self.pruning.rank.trained:
            self._recount(sparsity)
        elif step == 0 or not self.schedule.settled(step - 1, steps):
            self._choose(sparsity, loss)
        if not self.schedule.rewinds(step, steps):
            return False
        self._rewind()
        return True

    def settled(self, step: int, steps: int) -> bool:
        """Whether the masks of this step have the final sparsity."""
        return self.schedule.settled(step, steps)

    def progress(self, step: int, steps: int) -> float:
        """What the learning rate follows; see :class:`~certprune.pruning.schedules.OneShot`."""
        return self.schedule.progress(step, steps)

    def _recount(self, sparsity: float) -> None:
        """How many weights each layer keeps, by the present scores; which ones follows from the scores by itself."""
        masks = [mask_of(layer) for layer in self.layers.values()]
        offsets = [mask.offset.detach() for mask in masks] if self.pruning.share.learned else None
        counts = self.pruning.counts([mask.scores.detach() for mask in masks], sparsity, offsets)
        for mask, kept in zip(masks, counts, strict=True):
            mask.kept = kept

    def _choose(self, sparsity: float, loss: Loss) -> None:
        """Which weights stay, by the criterion's scores of the present weights, those masked away included."""
        gradients = None
        if self.pruning.rank.gradients:
            gradients = weight_gradients(materialize(self.model), list(self.layers), [loss])
        weights = {name: layer.parametrizations.weight.original.detach() for name, layer in self.layers.items()}
        scores = rank_weights(self.pruning, weights, gradients)
        counts = self.pruning.counts(scores, sparsity)
        for layer, found, kept in zip(self.layers.values(), scores, counts, strict=True):
            mask_of(layer).mask.copy_(self.pruning.where.select(found, kept))

    @torch.no_grad()
    def _rewind(self) -> None:
        """Everything but masks and scores as it was: weights, biases, batch normalisation with its statistics."""
        for name, tensor in _named_tensors(self.model):
            if name in self.origin:
                tensor.copy_(self.origin[name])


def _named_tensors(model: nn.Module):
    yield from model.named_parameters()
    yield from model.named_buffers()


def _tensors(module: nn.Module):
    yield from module.parameters()
    yield from module.buffers()
