"""Further training images from a .npz file, real or generated, with labels that a network gave them.

So Carmon et al. (2019, arXiv 1905.13736) mix 500,000 tiny images into CIFAR-10, and HYDRA trains with them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy
import torch

from certifiers.errors import InputError
from certprune.data.images import ByteImages
from certprune.data.splits import Split

# Names of (images, labels) in files that are about: generated data sets, ours, Carmon et al.'s.
NAMES = (("image", "label"), ("images", "labels"), ("data", "extrapolated_targets"))
CONVERT = (
    "Carmon et al. publish a pickle, which is never read here, since to read a pickle is to run it. Where you trust "
    "it, turn it into a .npz once: numpy.savez(file, data=d['data'], extrapolated_targets=d['extrapolated_targets'])"
)


def load_extra(path: str | Path, shape: tuple[int, int, int], classes: int) -> Split:
    """The images of a .npz file, as bytes, for a data set of that `shape` (channels, height, width).

    The file holds images (n, height, width, channels) or (n, channels, height, width), uint8, and integer labels
    (n,), under one of the pairs of `NAMES`. Nothing is unpickled. Raises InputError for everything else.
    """
    path = Path(path).expanduser()
    if path.suffix in (".pickle", ".pkl"):
        raise InputError(f"extra: {path} is a pickle. {CONVERT}.")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            names = next((pair for pair in NAMES if set(pair) <= set(file.files)), None)
            if names is None:
                wanted = " or ".join(f"{images} and {labels}" for images, labels in NAMES)
                raise InputError(f"extra: {path} must hold the arrays {wanted}, but it holds {', '.join(file.files)}.")
            images, labels = (file[name] for name in names)
    except FileNotFoundError as error:
        raise InputError(f"extra: there is no file {path}. {CONVERT}.") from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"extra: {path} is no .npz file of plain arrays ({error}). {CONVERT}.") from error
    pixels = _checked_images(torch.from_numpy(images) if images.dtype == numpy.uint8 else None, images, shape, path)
    return Split(ByteImages(pixels), _checked_labels(labels, len(pixels), classes, path))


def _checked_images(
    pixels: torch.Tensor | None, images: numpy.ndarray, shape: tuple[int, int, int], path: Path
) -> torch.Tensor:
    channels_last = (*shape[1:], shape[0])
    if pixels is None or pixels.ndim != 4 or tuple(pixels.shape[1:]) not in (shape, channels_last) or not len(pixels):
        raise InputError(
            f"extra: the images of {path} must be bytes (uint8) of shape (number, {', '.join(map(str, channels_last))})"
            f" or (number, {', '.join(map(str, shape))}), like the data set's, but {images.dtype} of shape "
            f"{images.shape} came."
        )
    if tuple(pixels.shape[1:]) == shape:
        return pixels
    return pixels.permute(0, 3, 1, 2).contiguous()


def _checked_labels(labels: numpy.ndarray, count: int, classes: int, path: Path) -> torch.Tensor:
    whole = labels.dtype.kind in "iu" or labels.dtype.kind == "f" and bool((labels == labels.round()).all())
    if labels.shape != (count,) or not whole or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"extra: the labels of {path} must be {count} integers from 0 to {classes - 1}, one an image, but "
            f"{labels.dtype} of shape {labels.shape} came. Images without a label need one first: let a network that "
            "is trained on the data set give it."
        )
    return torch.from_numpy(labels.astype(numpy.int64))
