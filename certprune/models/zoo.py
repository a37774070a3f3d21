"""torchvision's classification networks by name, with weights to be trained: "torchvision:resnet34"."""

from __future__ import annotations

import difflib

from torch import nn

from certifiers.bridges import import_torchvision
from certifiers.errors import InputError

PREFIX = "torchvision:"


def resnet50(input_shape: tuple[int, int, int], classes: int, **options) -> nn.Module:
    """ResNet-50, torchvision's, for large images (224x224): 25,502,912 weights on ImageNet.

    Options are those of torchvision's builder, say `width_per_group: 128`.
    """
    return torchvision_model("resnet50", input_shape, classes, **options)


def torchvision_model(name: str, input_shape: tuple[int, int, int], classes: int, **options) -> nn.Module:
    """torchvision's classification network `name`, untrained, for colour images in [0, 1].

    Options are those of its builder. Auxiliary classifiers are left out, since an objective has one loss. Raises
    InputError for an unknown name, options that the builder does not take, images of one channel, and ready-made
    weights.
    """
    zoo = import_torchvision().models
    known = zoo.list_models(module=zoo)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise InputError(
            f"torchvision has no classification network {name!r}.{hint} torchvision.models.list_models() lists "
            f"{len(known)} of them."
        )
    if input_shape[0] != 3:
        raise InputError(
            f"torchvision's networks take colour images, 3 channels, but these have {input_shape[0]}. Use a data set "
            "in colour, or another network."
        )
    if {"weights", "num_classes", "pretrained", "weights_backbone"} & set(options):
        raise InputError(
            f"{PREFIX}{name}: weights and num_classes are not options. A recipe trains its network from the first "
            "weights, and the data set says how many classes there are."
        )
    if name in ("inception_v3", "googlenet"):
        options = {"aux_logits": False, "init_weights": False, **options}
    try:
        model = zoo.get_model(name, weights=None, num_classes=classes, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"torchvision could not build {name!r} with the options {options}: {error}.") from error
    if getattr(model, "aux_logits", False):
        raise InputError(f"{PREFIX}{name}: an auxiliary classifier has a loss of its own; set aux_logits to false.")
    return model
