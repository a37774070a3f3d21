"""Masks of `torch.nn.utils.prune` (`weight_orig` and `weight_mask`) become ours, and ours become such."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from certifiers.errors import InputError
from certprune.masks import apply_masks, mask_state, materialize
from certprune.pruning.layers import prunable_layers


@torch.no_grad()
def from_torch_prune(model: nn.Module) -> nn.Module:
    """Turn the weight masks of `torch.nn.utils.prune` into ours, in place; returns `model`, with the same outputs.

    The masks are fixed and cover the layers that were pruned; the weights below them keep their values. A model
    whose state was saved with `weight_orig` and `weight_mask` is read by giving its layers `prune.identity` first.
    Raises InputError, before anything is changed, for a model without such masks, for pruned biases, and for masks
    of layers that are neither linear nor convolutions.
    """
    pruned = {name: module for name, module in model.named_modules() if _masked(module)}
    known = prunable_layers(model)
    if not pruned:
        raise InputError("No layer of this model is pruned by torch.nn.utils.prune: none has a weight_mask.")
    for name, module in pruned.items():
        others = [
            key for key, _ in module.named_buffers(recurse=False) if key.endswith("_mask") and key != "weight_mask"
        ]
        if name not in known or others:
            what = f"its {others[0].removesuffix('_mask')}" if others else f"a {type(module).__name__}"
            raise InputError(
                f"The layer {name!r} is pruned in {what}, but masks here are of the weights of linear layers and "
                "convolutions. Make that part permanent first: torch.nn.utils.prune.remove(layer, name)."
            )
        if not ((module.weight_mask == 0) | (module.weight_mask == 1)).all():
            raise InputError(f"The weight_mask of {name!r} must hold only 0 and 1, but other values came.")
    masks = {}
    for name, module in pruned.items():
        masks[f"{name}.weight"] = module.weight_mask.bool()
        original = module.weight_orig.detach().clone()
        prune.remove(module, "weight")
        module.weight.copy_(original)
    return apply_masks(model, masks)


@torch.no_grad()
def to_torch_prune(model: nn.Module) -> nn.Module:
    """A copy whose masks are those of `torch.nn.utils.prune`, with the same outputs; `model` stays as it is.

    Each masked layer gets `weight_orig` (its weights below the mask) and `weight_mask`. Masks that follow scores are
    taken as they are now. Raises InputError for a model without masks.
    """
    masks = mask_state(model)
    if not masks:
        raise InputError(
            "This model has no masks to export. sparsify(model) or apply_masks(model, masks) gives it some."
        )
    layers = prunable_layers(model)
    plain = materialize(model)
    copies = prunable_layers(plain)
    for key, mask in masks.items():
        name = key.removesuffix(".weight")
        copies[name].weight.copy_(layers[name].parametrizations.weight.original)
        prune.custom_from_mask(copies[name], "weight", mask)
    return plain


def _masked(module: nn.Module) -> bool:
    plain = not parametrize.is_parametrized(module)
    return plain and hasattr(module, "weight_mask") and hasattr(module, "weight_orig")
