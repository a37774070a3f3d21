"""Random changes of training images that leave the label as it is, a whole batch at a time on its own device.

They draw from torch's global generator of that device, which the training loop seeds for each epoch. To add one: a
function (x) -> x of the same shape, in [0, 1], and a line in `AUGMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from certifiers.errors import InputError
from certprune.registry import unknown_name

RESIZED_CROP = "resized_crop"  # not of a batch: made when a file is read (see images.py)
PADDING = 4


def crop(x: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels in each direction; what comes in is black (He et al. 2016)."""
    count, channels, height, width = x.shape
    shifts = torch.randint(2 * PADDING + 1, (2, count, 1), device=x.device)
    rows = shifts[0] + torch.arange(height, device=x.device)
    columns = shifts[1] + torch.arange(width, device=x.device)
    padded = F.pad(x, [PADDING] * 4)
    image = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(x: Tensor) -> Tensor:
    """Half of the images, mirrored left to right."""
    chosen = torch.rand((len(x), 1, 1, 1), device=x.device) < 0.5
    return torch.where(chosen, x.flip(3), x)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"crop": crop, "flip": flip}


def augmented(x: Tensor, names: Sequence[str]) -> Tensor:
    """`x` after each of the augmentations in their order."""
    for name in names:
        if name in AUGMENTATIONS:
            x = AUGMENTATIONS[name](x)
    return x


def checked_augment(names: object, resizable: bool) -> tuple[str, ...]:
    """`names` as a tuple, or an InputError; `resizable`: whether the images are files, to be cropped at any size."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"augment must be a list such as [crop, flip], or [] for none, but {names!r} came.")
    known = {*AUGMENTATIONS, RESIZED_CROP}
    for name in names:
        if name not in known:
            raise unknown_name("augmentation", name, known)
    if RESIZED_CROP in names and not resizable:
        raise InputError(f"augment: {RESIZED_CROP} is for imagenet, whose images are larger than the network's input.")
    return tuple(names)
