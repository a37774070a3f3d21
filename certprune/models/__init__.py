"""Models by name, torchvision's by "torchvision:name", or the user's own by "package.module:callable".

To add one: write a function (input_shape, classes, **options) -> nn.Module, and give it a line in `MODELS`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from certifiers.errors import InputError
from certprune.models import zoo
from certprune.models.networks import cnn7, cnn_large, cnn_small, mlp
from certprune.models.normalise import Normalise
from certprune.models.residual import cnn_resnet, resnet18, wrn_28_4, wrn_28_10
from certprune.models.vgg import vgg16_bn
from certprune.registry import check_options, import_callable, is_import_path, option_names, unknown_name

__all__ = ["MODELS", "ModelRow", "Normalise", "build_model", "models"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn7": cnn7,
    "cnn_large": cnn_large,
    "cnn_resnet": cnn_resnet,
    "cnn_small": cnn_small,
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet50": zoo.resnet50,
    "vgg16_bn": vgg16_bn,
    "wrn_28_10": wrn_28_10,
    "wrn_28_4": wrn_28_4,
}


@dataclass(frozen=True)
class ModelRow:
    """One line of `certprune models`."""

    name: str
    summary: str
    options: tuple[str, ...]


def models() -> list[ModelRow]:
    """The models known by name, each with what it is and its options."""
    return [
        ModelRow(
            name,
            (inspect.getdoc(builder) or "").split("\n\n")[0].replace("\n", " "),
            (*(option_names(builder, positional=2) or ("those of torchvision",)), "mean", "std"),
        )
        for name, builder in sorted(MODELS.items())
    ]


def build_model(name: str, input_shape: tuple[int, int, int], classes: int, **options) -> nn.Module:
    """A new model on the CPU: (batch, *input_shape) with pixels in [0, 1] -> logits (batch, classes).

    `name` is one of `MODELS`, "torchvision:" and the name of a classification network there, or
    "package.module:callable", which is called as `callable(input_shape, classes, **options)`; a class of networks
    that takes no input_shape is called as `Class(num_classes=classes, **options)`. The options `mean`
    and `std` (a number, or one per channel) put a :class:`Normalise` first; they serve every model and are never
    passed on. Weights are drawn from torch's global generator: seed it before. Raises InputError for an unknown
    name, unknown options, or a builder whose result is no nn.Module or has logits of another shape.
    """
    input_shape = _checked_shape(input_shape, classes)
    mean, std = options.pop("mean", None), options.pop("std", None)
    if (mean is None) != (std is None):
        raise InputError("A model's mean and std go together, but only one of them came. Give both.")
    theirs = isinstance(name, str) and name.startswith(zoo.PREFIX)
    own = is_import_path(name)
    if theirs:
        builder = partial(zoo.torchvision_model, name.removeprefix(zoo.PREFIX))
    elif own:
        builder = _own_builder(import_callable(name, "model"))
    elif name in MODELS:
        builder = MODELS[name]
    else:
        raise unknown_name("model", name, MODELS, more=f", {zoo.PREFIX}NAME, or your own as 'package.module:callable'")
    check_options(builder, options, f"The model {name!r}", positional=2)
    build = _call_own if own and not theirs else _call_known
    model = build(builder, name, input_shape, classes, options)
    if mean is None:
        return model
    first = Normalise(mean, std, channels=input_shape[0])
    rest = model.named_children() if type(model) is nn.Sequential and not own else [("model", model)]
    return nn.Sequential(OrderedDict([("normalise", first), *rest]))


def _checked_shape(input_shape: tuple[int, int, int], classes: int) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"input_shape must be (channels, height, width), positive ints, but {shape} came.")
    if not isinstance(classes, int) or classes < 2:
        raise InputError(f"A classifier needs at least 2 classes, but {classes!r} came.")
    return shape


def _call_known(builder: Callable, name: str, input_shape: tuple, classes: int, options: dict) -> nn.Module:
    return builder(input_shape, classes, **options)


def _own_builder(found: Callable) -> Callable:
    """`found`, or for a network's class whose constructor knows no input_shape, a builder that calls it by keywords."""
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return found
    parameters = inspect.signature(found).parameters
    if "input_shape" in parameters:
        return found

    def build(input_shape, classes, **options) -> nn.Module:
        return found(**({"num_classes": classes} if "num_classes" in parameters else {}), **options)

    rest = [p.replace(kind=p.KEYWORD_ONLY) for key, p in parameters.items() if key != "num_classes" and _named(p)]
    more = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    leading = [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in ("input_shape", "classes")]
    build.__signature__ = inspect.Signature([*leading, *rest, *more])
    return build


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _call_own(builder: Callable, name: str, input_shape: tuple, classes: int, options: dict) -> nn.Module:
    """The user's model, checked: an nn.Module with logits (batch, classes) on a batch of two black images."""
    try:
        inspect.signature(builder).bind(input_shape, classes, **options)
    except TypeError as error:
        raise InputError(
            f"The model {name!r} is called as callable(input_shape, classes, **options), here with options "
            f"{options}, but its signature is {inspect.signature(builder)}: {error}."
        ) from error
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell
    model = builder(input_shape, classes, **options)
    if not isinstance(model, nn.Module):
        raise InputError(f"The model {name!r} must return a torch.nn.Module, but it returned a {type(model).__name__}.")
    _check_logits(model, name, input_shape, classes)
    return model


def _check_logits(model: nn.Module, name: str, input_shape: tuple[int, int, int], classes: int) -> None:
    tensor = next(model.parameters(), torch.zeros(()))
    training = [module for module in model.modules() if module.training]
    model.eval()  # running statistics must not move
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *input_shape, dtype=tensor.dtype, device=tensor.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The model {name!r} failed on images of shape {input_shape} (channels, height, width): {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, classes):
        raise InputError(
            f"The model {name!r} must return logits of shape (batch, classes) = (2, {classes}) for 2 images, "
            f"but {shape} came."
        )
