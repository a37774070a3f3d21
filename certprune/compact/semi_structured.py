"""2:4 sparse linear layers on torch's semi-structured kernels, where the device has them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from certifiers.errors import InputError

_DTYPES = (torch.float16, torch.bfloat16)


def semi_structured(model: nn.Module) -> nn.Module:
    """A copy whose linear layers of a 2:4 pattern run on the device's sparse tensor cores; the rest is unchanged.

    For running a network, not for certifying it: half precision is another function than the one that was certified.

    Raises InputError where the device has no such kernels (they need CUDA and compute capability 8.0), where weights
    are not in half precision, and where no linear layer has the pattern in a size that the kernels take.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        what = "the CPU" if device.type == "cpu" else f"{device} ({_capability(device)})"
        raise InputError(
            "Semi-structured (2:4) kernels need an NVIDIA GPU of compute capability 8.0 or more, but the model is on "
            f"{what}. Move it to one with model.to('cuda').half(), or use certprune.compact, which needs none."
        )
    found = copy.deepcopy(model)
    layers = [(name, layer) for name, layer in found.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in layers:
        if layer.weight.dtype not in _DTYPES:
            raise InputError(
                f"Semi-structured kernels need half precision, but {name} is {layer.weight.dtype}. Call model.half()."
            )
    chosen = [layer for _, layer in layers if is_two_of_four(layer.weight)]
    changed = [layer for layer in chosen if _converted(layer)]
    if not changed:
        raise InputError(
            f"None of the {len(layers)} linear layers has at most 2 of every 4 weights in a row, in a size that the "
            "kernels take (multiples of 64). Prune with the pattern 2:4, and leave the network's widths as they are."
        )
    return found


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of each 4 weights in a row of (out, in) at most 2 are not zero."""
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def _converted(layer: nn.Linear) -> bool:
    """Whether the layer's weight could be handed to the kernels; done in place."""
    try:
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    except RuntimeError:  # a size that they do not take
        return False
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    return True


def _capability(device: torch.device) -> str:
    if device.type != "cuda":
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor}"
