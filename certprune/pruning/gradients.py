"""The gradients of a loss by effective weights, for the criteria and the regrowth that rank by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certprune.pruning.criteria import Gradients


def weight_gradients(
    plain: nn.Module, layers: Sequence[str], losses: Iterable[Callable[[nn.Module], Tensor]]
) -> dict[str, Gradients]:
    """For each of the `layers`, by name, the gradients of the losses by its weight, and of their squares, in the mean.

    `plain`: a model without masks, as `materialize` makes a copy of one, so that weights that are masked away have a
    gradient too. `losses`: functions of the model, one a batch. The weights and their `.grad` stay as they are.
    Raises InputError for gradients that are not finite.
    """
    weights = [plain.get_submodule(name).weight for name in layers]
    means, squares, count = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights], 0
    for count, loss in enumerate(losses, start=1):  # noqa: B007 (the number of losses)
        found = torch.autograd.grad(loss(plain), weights, allow_unused=True)
        for mean, square, gradient in zip(means, squares, found, strict=True):
            if gradient is not None:
                mean += gradient
                square += gradient.square()
    for name, square in zip(layers, squares, strict=True):
        if not torch.isfinite(square).all():
            raise InputError(
                f"The loss's gradient by the weights of {name!r} is not finite, so they cannot be ranked by it. The "
                "network or the objective's eps is too large for this loss: train it longer, or lower eps."
            )
    return {
        name: Gradients(mean / max(count, 1), square / max(count, 1))
        for name, mean, square in zip(layers, means, squares, strict=True)
    }
