"""Masked models: a mask is a `torch.nn.utils.parametrize` parametrisation of a layer's `weight`.

Layers stay `nn.Conv2d` and `nn.Linear`; whoever reads `layer.weight` sees the effective weight, weight *
mask. Each read computes it again: wrap a step that reads it more than once in
`torch.nn.utils.parametrize.cached()`.

    sparsify(model, sparsity=0.99)       # in place: masks that follow trainable scores
    ...                                  # train score_parameters(model)
    freeze_masks(model)                  # in place: the same masks, fixed
    ...                                  # train weight_parameters(model)
    plain = materialize(model)           # a plain model, same outputs to the bit
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from certifiers.errors import InputError
from certprune.pruning.criteria import Gradients
from certprune.pruning.layers import prunable_layers, select_layers
from certprune.pruning.parametrisations import FixedMask, ScoreMask
from certprune.pruning.plan import Pruning


@dataclass(frozen=True)
class LayerSparsity:
    """`kept` of the `weights` of the layer `name` remain."""

    name: str
    weights: int
    kept: int


@dataclass(frozen=True)
class SparsityReport:
    """`total` is the fraction that is gone of all `weights` of convolutions and linear layers (not biases)."""

    total: float
    kept: int
    weights: int
    layers: list[LayerSparsity]

    def as_dict(self) -> dict:
        """Plain dicts, lists and numbers, for JSON."""
        return asdict(self)


def sparsify(
    model: nn.Module,
    sparsity: float = 0.99,
    criterion: str = "score",
    budget: str = "uniform",
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    seed: int = 0,
    floor: float | int | None = None,
    pattern: str = "unstructured",
    gradients: Mapping[str, Gradients] | None = None,
) -> nn.Module:
    """Mask the weights of `model` in place, so that the fraction `sparsity` of them is removed; returns
    `model`.

    Every convolution and linear layer is masked, the last included, biases never; `layers` and `exclude` are
    patterns of layer names ("fc*"). `budget` (see `pruning.BUDGETS`) says how many weights each layer keeps,
    of these layers together, and at least `floor` (a number, or a fraction of the layer's); `criterion` (see
    `pruning.CRITERIA`) says which; `pattern` where they may lie ("unstructured", "2:4", "channels"). "score" and
    "joint" masks follow trainable scores, the others are fixed at once; only "random" uses `seed`, and "snip" and
    "taylor" need the loss's `gradients` by layer (`pruning.weight_gradients`). What requires a gradient stays as it
    is. Budgets that compare layers' scores use those of now: a :class:`~certprune.masker.Masker` moves counts later.

    Raises InputError, before anything is changed, for a sparsity outside [0, 1), unknown names, patterns
    that match nothing or do not fit, weights that are not finite, and layers that are masked or parametrised already
    or share a weight.
    """
    pruning = Pruning(sparsity, criterion, budget, floor, pattern, seed)
    chosen = select_layers(model, layers, exclude)
    _check_weights(model, chosen)
    pruning.where.check(model, chosen)
    scores = rank_weights(pruning, {name: layer.weight.detach() for name, layer in chosen.items()}, gradients)
    trained, where = pruning.rank.trained, pruning.where
    for layer, found, kept in zip(chosen.values(), scores, pruning.counts(scores), strict=True):
        if trained:
            mask: nn.Module = ScoreMask(found, kept, where, offset=pruning.share.learned)
        else:
            mask = FixedMask(where.select(found, kept))
        parametrize.register_parametrization(layer, "weight", mask)
    return model


def rank_weights(
    pruning: Pruning, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, Gradients] | None = None
) -> list[torch.Tensor]:
    """The criterion's scores of the weights of each layer; InputError if it needs gradients and none came."""
    if pruning.rank.gradients and gradients is None:
        raise InputError(
            f"The criterion {pruning.criterion!r} ranks weights by the loss's gradients, but none came. Give "
            "gradients=weight_gradients(model, layers, losses), from certprune.pruning."
        )
    generator = torch.Generator().manual_seed(pruning.seed)
    return [
        pruning.rank.scores(weight, generator, gradients[name] if gradients else None)
        for name, weight in weights.items()
    ]


def materialize(model: nn.Module) -> nn.Module:
    """A copy without masks, of plain layers with the effective weights: same outputs to the bit.

    Its `state_dict` has the keys, in the order, of the model before `sparsify`; every parameter requires a
    gradient again. `model` stays as it is.
    """
    plain = copy.deepcopy(model)
    for name, layer in prunable_layers(plain).items():
        if mask_of(layer) is None:
            continue
        if set(layer.parametrizations) != {"weight"} or len(layer.parametrizations.weight) != 1:
            raise InputError(f"The layer {name!r} has other parametrisations beside its mask. Remove them first.")
        with torch.no_grad():
            weight = layer.parametrizations.weight()
        # Not `remove_parametrizations`: it edits the layer's class, which a deep copy shares with its model.
        plain_class = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = plain_class
        others = dict(layer._parameters)
        layer._parameters.clear()
        layer._parameters.update({"weight": nn.Parameter(weight.clone()), **others})
    return plain.requires_grad_(True)


def sparsity(model: nn.Module) -> SparsityReport:
    """How many weights remain, in all and per layer, over *all* convolutions and linear layers of the model.

    A masked layer keeps what its mask keeps; a plain one its weights that are not zero, so that a
    materialised model is reported too. Layers that were left out of the pruning count as what they are.
    """
    rows = []
    for name, layer in prunable_layers(model).items():
        mask = mask_of(layer)
        kept = int(torch.count_nonzero(layer.weight)) if mask is None else mask.kept
        rows.append(LayerSparsity(name, layer.weight.numel(), kept))
    kept, weights = sum(row.kept for row in rows), sum(row.weights for row in rows)
    return SparsityReport(1 - kept / weights if weights else 0.0, kept, weights, rows)


def freeze_masks(model: nn.Module) -> nn.Module:
    """Fix the masks of the present scores, in place; the scores are dropped. Returns `model`.

    Outputs stay the same to the bit, and so does what requires a gradient.
    """
    for layer in prunable_layers(model).values():
        if isinstance(mask_of(layer), ScoreMask):
            layer.parametrizations.weight[0] = FixedMask(mask_of(layer).mask)
    return model


def mask_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks (bool, True = kept) of the masked layers, by the name of the weight: "conv1.weight"."""
    masks = {name: mask_of(layer) for name, layer in prunable_layers(model).items()}
    return {f"{name}.weight": mask.mask.detach().clone() for name, mask in masks.items() if mask is not None}


def apply_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """Mask the named weights with fixed masks, in place, in the form that :func:`mask_state` gives; returns
    `model`.

    Masks are bool, or uint8 of 0 and 1. A layer's present mask is replaced. Raises InputError, before
    anything is changed, for a name that is no prunable weight, another shape, or other values.
    """
    found = {f"{name}.weight": layer for name, layer in prunable_layers(model).items()}
    for name, mask in masks.items():
        if name not in found:
            raise InputError(
                f"There is a mask for {name!r}, but this model has no such weight to prune. It has: "
                f"{', '.join(found)}. These masks belong to another model."
            )
        if mask.shape != found[name].weight.shape:
            raise InputError(
                f"The mask of {name!r} has shape {tuple(mask.shape)}, but the weight has "
                f"{tuple(found[name].weight.shape)}. These masks belong to another model."
            )
        if mask.dtype != torch.bool and not torch.all((mask == 0) | (mask == 1)):
            raise InputError(f"The mask of {name!r} must hold only 0 and 1, but other values came.")
    unmasked = {name.removesuffix(".weight"): found[name] for name in masks if mask_of(found[name]) is None}
    _check_weights(model, unmasked)
    for name, mask in masks.items():
        layer = found[name]
        fixed = FixedMask(mask.to(device=layer.weight.device, dtype=torch.bool))
        if mask_of(layer) is None:
            parametrize.register_parametrization(layer, "weight", fixed)
        else:
            layer.parametrizations.weight[0] = fixed
    return model


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable scores of the masks, and the layers' offsets if those are learned; empty if there are none."""
    return [each for module in model.modules() if isinstance(module, ScoreMask) for each in module.parameters()]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is not a score: weights, biases, BatchNorm's scale and shift."""
    scores = {id(parameter) for parameter in score_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in scores]


def mask_of(layer: nn.Module) -> ScoreMask | FixedMask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations.weight[0]
    return first if isinstance(first, (ScoreMask, FixedMask)) else None


def _check_weights(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise an InputError unless each chosen layer's weight is a finite parameter that is its own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            owners.setdefault(id(parameter), []).append(key)
    for name, layer in chosen.items():
        if mask_of(layer) is not None:
            raise InputError(
                f"The layer {name!r} is masked already. Start from a plain model: materialize(model) is one."
            )
        if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
            raise InputError(
                f"The weight of {name!r} is not a plain parameter: it is parametrised, normalised or pruned "
                "by other means. Make that permanent first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations)."
            )
        shared = owners[id(layer.weight)]
        if len(shared) > 1:
            raise InputError(
                f"The weight of {name!r} is shared: {', '.join(shared)}. A mask would part them. Share the "
                "whole layer instead, or exclude it from pruning."
            )
        if not torch.isfinite(layer.weight).all():
            raise InputError(
                f"The weights of {name!r} must be finite, but some are NaN or infinite. Training diverged, "
                "or the file is damaged: train again with a lower learning rate or with gradient clipping."
            )
