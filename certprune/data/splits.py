"""What a data set is: checked images in three splits, the same for a seed on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch

from certifiers.errors import InputError
from certprune.data.images import ByteImages, FileImages, select


@dataclass(frozen=True, eq=False)
class Split:
    """Images x, float32 (n, channels, height, width) with pixels in [0, 1], and labels y, int64 (n,).

    x is a tensor, or reads like one: `x[index]` is such a tensor, whatever is kept (see images.py).
    """

    x: torch.Tensor | ByteImages | FileImages
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits that share no image; `shape` is (channels, height, width), labels are below `classes`.

    `augment`: how training changes its images (see augment.py). The last `extra` training images are of another
    source, and make up `extra_share` of each training batch.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split
    augment: tuple[str, ...] = ()
    extra: int = 0
    extra_share: float = 0.0

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of every pixel and label, split by split, in order.

        Of images that stay files, their names and lengths stand for the pixels.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.x.shape)).encode())
            for part in (split.x, split.y):
                tensor = isinstance(part, torch.Tensor)
                digest.update(numpy.ascontiguousarray(part.numpy()).data if tensor else part.digest())
        return digest.hexdigest()[:16]


def checked_split(images: Any, labels: Any, what: str) -> Split:
    """`images` and `labels` as a :class:`Split`, from NumPy arrays, tensors or nested lists.

    Images are (n, height, width) or (n, channels, height, width), floating-point, finite, in [0, 1]; labels
    are n integers that are not negative. Anything else is an InputError; `what` says in it which images are
    meant.
    """
    x = _checked_images(images, what)
    return Split(x, _checked_labels(labels, len(x), what))


def _checked_images(images: Any, what: str) -> torch.Tensor:
    x = _tensor(images, f"the images of {what}")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or x.numel() == 0:
        raise InputError(
            f"The images of {what} must have the shape (number, channels, height, width), none of them 0, "
            f"but {tuple(x.shape)} came."
        )
    if x.shape[3] in (3, 4) and x.shape[1] == x.shape[2] > 4:
        raise InputError(
            f"The images of {what} have the shape {tuple(x.shape)}, which looks like channels last. Give "
            "(number, channels, height, width): numpy.moveaxis(images, 3, 1)."
        )
    if not x.is_floating_point():
        raise InputError(
            f"The images of {what} must be floating-point numbers in [0, 1], but {x.dtype} came. Bytes from "
            "0 to 255 become that by images / 255."
        )
    x = x.to(torch.float32).contiguous()
    if not torch.isfinite(x).all():
        raise InputError(f"The images of {what} must be finite, but some pixels are NaN or infinite.")
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise InputError(
            f"The images of {what} must be in [0, 1], but their pixels range from {low:g} to {high:g}. Scale "
            "them (bytes: images / 255); mean and std belong to the model, not to the data."
        )
    return x


def _checked_labels(labels: Any, count: int, what: str) -> torch.Tensor:
    y = _tensor(labels, f"the labels of {what}")
    if y.ndim != 1 or len(y) != count:
        raise InputError(
            f"The labels of {what} must be one integer an image, shape ({count},), but {tuple(y.shape)} came."
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"The labels of {what} must be integers, but {y.dtype} came.")
    y = y.to(torch.int64)
    if y.min() < 0:
        raise InputError(f"The labels of {what} must count from 0, but {y.min().item()} is among them.")
    return y


def _tensor(values: Any, what: str) -> torch.Tensor:
    try:
        if isinstance(values, torch.Tensor):
            return values.detach().cpu()
        return torch.from_numpy(numpy.array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Cannot read {what}: an array of numbers was expected ({error}).") from error


def checked_classes(name: str, splits: dict[str, Split], classes: int | None = None) -> int:
    """The number of classes of the splits, after a look at whether they fit each other.

    The images must have one shape, and the labels must be below `classes`; None takes it from the training
    labels.
    """
    train = splits["train"]
    if classes is None:
        classes = int(train.y.max()) + 1
    if classes < 2:
        raise InputError(f"The data set {name!r} needs at least 2 classes, but has {classes}.")
    for key, split in splits.items():
        if split.x.shape[1:] != train.x.shape[1:]:
            raise InputError(
                f"All images of {name!r} must have one shape (channels, height, width), but those of train "
                f"have {tuple(train.x.shape[1:])} and those of {key} {tuple(split.x.shape[1:])}."
            )
        if split.y.max() >= classes:
            raise InputError(
                f"The labels of {name!r} ({key}) must be from 0 to {classes - 1} for its {classes} classes, "
                f"but {split.y.max().item()} is among them."
            )
    return classes


def stratified(split: Split, fraction: float, seed: int, what: str) -> tuple[Split, Split]:
    """(rest, part): `part` is the `fraction` of the images, each class in proportion; both in shuffled order.

    By scikit-learn's `train_test_split`, so that a seed gives the same split on every machine. `what` names
    the option in errors.
    """
    from sklearn.model_selection import train_test_split  # slow to import; not every data set is split

    number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if not number or not 0 < fraction < 1:
        raise InputError(f"{what} is a fraction of the images, above 0 and below 1, but {fraction!r} came.")
    labels = split.y.numpy()
    try:
        rest, part = train_test_split(
            numpy.arange(len(labels)), test_size=float(fraction), random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise InputError(
            f"{what} = {fraction} cannot part {len(labels)} images so that each class keeps its proportion "
            f"({error}). Give more images of each class, or another fraction."
        ) from error
    return tuple(Split(select(split.x, index), split.y[index]) for index in map(torch.from_numpy, (rest, part)))
