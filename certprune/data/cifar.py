"""CIFAR-10 and CIFAR-100 out of the publisher's *binary version*: records of label bytes and 3 x 32 x 32 pixels.

The version for Python, which torchvision gets, consists of pickles: to read it is to run it. It is never read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from certifiers.errors import InputError
from certprune.data.fetch import Archive, check_download, find_folder, folder_of
from certprune.data.images import ByteImages
from certprune.data.splits import Split

SHAPE = (3, 32, 32)
SITE = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Source:
    """`labels`: bytes before the pixels of a record, the last of which is the class."""

    title: str
    archive: Archive
    folder: str
    train: tuple[str, ...]
    test: str
    labels: int
    classes: int
    python_folder: str


CIFAR10 = Source(
    "CIFAR-10",
    Archive(f"{SITE}cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar-10-batches-bin",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test_batch.bin",
    labels=1,
    classes=10,
    python_folder="cifar-10-batches-py",
)
CIFAR100 = Source(
    "CIFAR-100",
    Archive(f"{SITE}cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    "cifar-100-binary",
    ("train.bin",),
    "test.bin",
    labels=2,  # the coarse one, then the fine one
    classes=100,
    python_folder="cifar-100-python",
)


def load(source: Source, root: Path, download: bool = True) -> dict[str, Split]:
    """The splits "train" and "test", as bytes.

    Raises InputError if they are nowhere to be had, incomplete or damaged.
    """
    check_download(download)
    pickled = find_folder(root, source.folder, source.test) is None and (root / source.python_folder).is_dir()
    if pickled and not download and not (root / source.archive.name).is_file():
        raise InputError(
            f"{root} has {source.python_folder}, but that version of {source.title} consists of pickles, which are "
            f"never read here, since to read them is to run them. Put {source.archive.name} (from "
            f"{source.archive.url}) into {root}, or set download to true."
        )
    folder = folder_of(source.title, source.folder, source.test, source.archive, root, download)
    lacking = [name for name in (*source.train, source.test) if not (folder / name).is_file()]
    if lacking:
        raise InputError(f"{source.title} is incomplete: {folder} lacks {', '.join(lacking)}. Add what is missing.")
    return {
        "train": _split([_records(source, folder / name) for name in source.train]),
        "test": _split([_records(source, folder / source.test)]),
    }


def _records(source: Source, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels, labels) of one file."""
    length = source.labels + numpy.prod(SHAPE)
    content = numpy.fromfile(path, dtype=numpy.uint8)
    if len(content) == 0 or len(content) % length:
        raise InputError(
            f"The data file {path} is damaged: it should hold records of {length} bytes, but holds {len(content)} "
            f"bytes. Delete it and get it again: {source.archive.url}"
        )
    records = torch.from_numpy(content).view(-1, length)
    labels = records[:, source.labels - 1].to(torch.int64)
    if labels.max() >= source.classes:
        raise InputError(
            f"The data file {path} is damaged or another data set's: {source.title} has classes 0 to "
            f"{source.classes - 1}, but {labels.max().item()} is among its labels. Get it again: {source.archive.url}"
        )
    return records[:, source.labels :].reshape(-1, *SHAPE), labels


def _split(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Split:
    return Split(ByteImages(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts]))
