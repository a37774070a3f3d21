"""What must hold of a model before anything is proven about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from certifiers.errors import InputError


def check_model(model: nn.Module) -> None:
    """Raise InputError unless the model can be certified as it stands.

    It must be in eval mode throughout, treat each input by itself (no normalisation by the batch's statistics),
    hold plain weights (no parametrization or pruning mask that is applied on the fly), and all its parameters and
    buffers must be finite. Nor may autocast be on, which would compute bounds in fewer bits than they account for.
    """
    kind = device_of(model).type
    if torch.is_autocast_enabled(kind):
        raise InputError(
            f"Autocast is on for {kind}, and would compute in fewer bits than the weights have, bounds too. Certify "
            "outside of torch.autocast. (A network that is to be smoothed in fewer bits can have it in its forward.)"
        )
    for name, module in model.named_modules():
        where = f"its layer {name}" if name else "it"
        if module.training:
            raise InputError(
                f"The model must be in eval mode to be certified, but {where} is in train mode, where the "
                "output depends on more than the input (dropout, batch statistics). Call model.eval() first."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"The model must treat each input by itself to be certified, but {where} normalises by the statistics "
                "of whatever batch an input comes in (no running statistics), which an adversary changes too. Train "
                "it with track_running_stats=True."
            )
        if parametrize.is_parametrized(module):
            raise InputError(
                f"The model must hold plain weights to be certified, but {where} has a parametrization. Call "
                "materialize(model) first and certify what it returns, or, for a parametrization that is no "
                "pruning mask, torch.nn.utils.parametrize.remove_parametrizations."
            )
    if prune.is_pruned(model):
        raise InputError(
            "The model must hold plain weights to be certified, but it has masks of torch.nn.utils.prune. "
            "Call torch.nn.utils.prune.remove on its layers first."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"The model's {name} holds NaN or infinite values, so nothing can be proven about it. Train "
                "it anew, with a lower learning rate or gradient clipping, or take an earlier checkpoint."
            )


def count_classes(model: nn.Module, x: Tensor) -> int:
    """The number of logits, from a forward pass of the first input; InputError where the two do not fit."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != x.dtype:
            raise InputError(
                f"The inputs are {x.dtype}, but the model's {name} is {parameter.dtype}. Convert one of "
                f"them, for example with x.to({parameter.dtype})."
            )
    try:
        with torch.no_grad():
            logits = model(x[:1].to(device_of(model), copy=True))  # a model may write into its input
    except RuntimeError as error:
        raise InputError(
            f"The model does not take inputs of shape (batch, {', '.join(map(str, x.shape[1:]))}): "
            f"{str(error).splitlines()[0]}. Check that the inputs and the model belong to the same data set."
        ) from error
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise InputError(
            f"The model must give logits of shape (batch, classes) with 2 classes or more, but gave shape "
            f"{tuple(logits.shape)} for one input."
        )
    return logits.shape[1]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def check_logits(logits: Tensor, numbers: Sequence[int]) -> None:
    """Raise InputError if a row of logits (batch, classes) is not finite, naming the input by its number."""
    bad = (~logits.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"The model's output for input {numbers[bad[0]]} is NaN or infinite, though its weights are "
            "finite: they are so large that sums overflow. Train it anew with a lower learning rate or "
            "gradient clipping, or take an earlier checkpoint."
        )
