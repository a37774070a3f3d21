"""SVHN, house numbers cut to 32 x 32 (Netzer et al. 2011), out of the three .mat files of its publishers."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from certifiers.bridges import import_torchvision
from certifiers.errors import InputError
from certprune.data.fetch import Archive, check_download, checked_file
from certprune.data.images import ByteImages
from certprune.data.splits import Split

CLASSES = 10
FOLDER = "svhn"


def load(root: Path, download: bool = True, extra: bool = False) -> dict[str, Split]:
    """The splits "train" (73,257; with `extra` 604,388) and "test" (26,032), as bytes; the label of 0 is 0.

    The files are looked for in `root` and in `root`/svhn, and held against the checksums of torchvision's loader.
    Raises InputError if they are nowhere to be had or damaged.
    """
    check_download(download)
    if not isinstance(extra, bool):
        raise InputError(f"with_extra must be true or false, but {extra!r} came.")
    folder = root if (root / archive("test").name).is_file() else root / FOLDER
    train = [_read(archive(split), folder, download) for split in (("train", "extra") if extra else ("train",))]
    return {"train": _joined(train), "test": _read(archive("test"), folder, download)}


def archive(split: str) -> Archive:
    """Where torchvision has that file from, and its checksum."""
    url, _, md5 = import_torchvision().datasets.SVHN.split_list[split]
    return Archive(url, md5)


def _read(source: Archive, folder: Path, download: bool) -> Split:
    from scipy.io import loadmat

    path = checked_file("SVHN", source, folder, download)
    try:
        content = loadmat(path, variable_names=["X", "y"])
        pixels, labels = content["X"], content["y"].astype(numpy.int64).reshape(-1)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"The data file {path} is no .mat file of images X and labels y ({error}).") from error
    if pixels.dtype != numpy.uint8 or pixels.shape != (32, 32, 3, len(labels)):
        raise InputError(
            f"The data file {path} should hold bytes of shape (32, 32, 3, {len(labels)}), but holds {pixels.dtype} of "
            f"shape {pixels.shape}."
        )
    labels[labels == 10] = 0  # the publishers number the digit 0 as the tenth
    x = torch.from_numpy(numpy.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return Split(ByteImages(x), torch.from_numpy(labels))


def _joined(parts: list[Split]) -> Split:
    if len(parts) == 1:
        return parts[0]
    return Split(ByteImages(torch.cat([part.x.pixels for part in parts])), torch.cat([part.y for part in parts]))
