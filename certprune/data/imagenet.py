"""ImageNet and Tiny-ImageNet: image files in folders by class, read when they are needed.

The images of `val` are the test split, since the labels of the publishers' test images are secret; the validation
split is taken from the training images.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from certifiers.errors import InputError
from certprune.data.fetch import Archive, check_download, folder_of
from certprune.data.images import FileImages, View
from certprune.data.splits import Split

SUFFIXES = (".jpeg", ".jpg", ".png")
TINY = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
TINY_FOLDER = "tiny-imagenet-200"


def load_imagenet(root: Path, size: int = 224, resize: int = 256, workers: int | None = None) -> dict[str, Split]:
    """The splits "train" and "test" of root/train/CLASS/*.JPEG and root/val/CLASS/*.JPEG; classes in sorted order.

    Pixels are (3, `size`, `size`): the shorter side brought to `resize`, then the middle. Any number of classes will
    do. Raises InputError if the folders are not there or not so.
    """
    _check_sizes(size, resize)
    root = next((folder for folder in (root, root / "imagenet") if (folder / "train").is_dir()), root)
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise InputError(
                f"ImageNet was not found in {root}: there is no folder {split}. It cannot be downloaded without an "
                "account at image-net.org. Unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
                f"{root}/train/CLASS/*.JPEG and {root}/val/CLASS/*.JPEG (1,000 folders n01440764 ... each; "
                "torchvision.datasets.ImageNet does it where the archives lie), or set the option root."
            )
    classes = _folders(root / "train")
    foreign = sorted(set(_folders(root / "val")) - set(classes))
    if foreign:
        raise InputError(f"{root}/val has classes that {root}/train has not: {', '.join(foreign[:5])}.")
    view = View(size, resize)
    return {
        name: _split([(root / folder / c, label) for label, c in enumerate(classes)], view, workers)
        for name, folder in (("train", "train"), ("test", "val"))
    }


def load_tiny(root: Path, download: bool = True, workers: int | None = None) -> tuple[dict[str, Split], int]:
    """(splits "train" and "test" of Tiny-ImageNet, number of classes): 200 classes, 64 x 64 pixels.

    Raises InputError if it is nowhere to be had, incomplete or damaged.
    """
    check_download(download)
    folder = folder_of("Tiny-ImageNet", TINY_FOLDER, "wnids.txt", TINY, root, download)
    numbers = {name: label for label, name in enumerate(sorted((folder / "wnids.txt").read_text().split()))}
    train = _split([(folder / "train" / name / "images", label) for name, label in numbers.items()], View(64), workers)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise InputError(f"Tiny-ImageNet is incomplete: there is no {annotations}. Get it again: {TINY.url}")
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
    bad = [row for row in rows if len(row) < 2 or row[1] not in numbers]
    if bad:
        raise InputError(f"{annotations} is damaged: {bad[0]} names no image and class. Get it again: {TINY.url}")
    paths = [folder / "val" / "images" / name for name, _ in rows]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"Tiny-ImageNet is incomplete: there is no {missing[0]}. Get it again: {TINY.url}")
    labels = torch.tensor([numbers[name] for _, name in rows])
    return {"train": train, "test": _shuffled(paths, labels, View(64), workers)}, len(numbers)


def _split(folders: list[tuple[Path, int]], view: View, workers: int | None) -> Split:
    paths, labels = [], []
    for folder, label in folders:
        found = _images(folder)
        if not found:
            raise InputError(f"{folder} has no images (files that end in {', '.join(SUFFIXES)}).")
        paths += found
        labels += [label] * len(found)
    return _shuffled(paths, torch.tensor(labels), view, workers)


def _shuffled(paths: list[Path], labels: torch.Tensor, view: View, workers: int | None) -> Split:
    """In an order that is shuffled once and for all, so that the first n are a fair sample."""
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    workers = _checked_workers(workers)
    return Split(FileImages([paths[i] for i in order.tolist()], view, workers), labels[order].to(torch.int64))


def _folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(
            f"{folder} has no folders: it needs one for each class, with its images. (torchvision's "
            "datasets.ImageNet sorts the images of val into folders.)"
        )
    return names


def _images(folder: Path) -> list[Path]:
    """The images of a folder, sorted; without a look at each file, since there are a million."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(folder))
    return [folder / name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]


def _check_sizes(size: int, resize: int) -> None:
    for name, value in (("size", size), ("resize", resize)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a number of pixels, but {value!r} came.")
    if resize < size:
        raise InputError(f"resize ({resize}) must be at least size ({size}): the middle is cut out of it.")


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return min(8, os.cpu_count() or 1)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise InputError(f"workers must be a number of processes that read images, 0 for none, but {workers!r} came.")
    return workers
