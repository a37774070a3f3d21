"""VGG16 with batch normalisation in the form for small images, as HYDRA trains it on CIFAR-10 and SVHN."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from certprune.models.sizes import checked_width, scaled, shape_left

# Channels of the convolutions (3x3, padding 1) between max-pools of 2x2; the last group is not pooled.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16_bn(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Sequential:
    """VGG16-BN for small images (HYDRA's): 13 convolutions, pooled to 2x2, two layers of 256 units.

    As Simonyan & Zisserman 2015 with BatchNorm after each convolution (which has no bias), four max-pools, and the
    small head of HYDRA: 15,302,848 weights on CIFAR-10. Needs images of 16x16 at least.
    """
    checked_width("vgg16_bn", width)
    channels = input_shape[0]
    shape_left("vgg16_bn", input_shape, halvings=len(GROUPS) - 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    number = 0
    for group, sizes in enumerate(GROUPS, start=1):
        for base in sizes:
            number += 1
            out = scaled(base, width)
            layers[f"conv{number}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(out)
            layers[f"relu{number}"] = nn.ReLU()
            channels = out
        if group < len(GROUPS):
            layers[f"pool{group}"] = nn.MaxPool2d(2)
    layers["pool"] = nn.AdaptiveAvgPool2d(2)
    layers["flatten"] = nn.Flatten()
    units = scaled(256, width)
    for layer, (features, out) in enumerate(((4 * channels, units), (units, units)), start=1):
        layers[f"fc{layer}"] = nn.Linear(features, out)
        layers[f"relu{number + layer}"] = nn.ReLU()
    layers["fc3"] = nn.Linear(units, classes)
    return nn.Sequential(layers)
