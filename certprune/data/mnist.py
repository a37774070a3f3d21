"""MNIST and Fashion-MNIST in full: 60,000 training and 10,000 test images, 28x28, in four IDX files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from certifiers.bridges import import_torchvision
from certifiers.errors import InputError
from certprune.data.idx import read_idx
from certprune.data.splits import Split, checked_split

CLASSES = 10
# Split -> (images, labels), as they are called upstream; each plain or with ".gz".
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Source:
    """Where one of the data sets may be found, and how it can be got."""

    title: str
    torchvision: str  # the class, which is also its folder under a torchvision root
    package_folder: str | None = None  # below share/datasets, where a system package puts it
    remedy: str = ""


MNIST = Source("MNIST", "MNIST")
FASHION = Source(
    "Fashion-MNIST",
    "FashionMNIST",
    package_folder="fashion-mnist",
    remedy="install the Debian package (apt-get install dataset-fashion-mnist), or ",
)


def load(source: Source, root: Path, root_given: bool, download: bool = True) -> dict[str, Split]:
    """The splits "train" and "test", from the first folder that has the files, else from a download into
    `root`.

    Order: `root` if the user named it, the system package, the default root, the download. Raises InputError
    if there is nothing anywhere, or if what is there is incomplete or damaged.
    """
    files = find(source, root, root_given)
    if files is None:
        if not download:
            raise _missing(source, root, root_given, "the option download is false")
        _download(source, root, root_given)
        files = find(source, root, root_given=True)
        if files is None:
            raise _missing(source, root, root_given, f"torchvision left no files in {root}")
    return {split: _read(source, split, images, labels) for split, (images, labels) in files.items()}


def find(source: Source, root: Path, root_given: bool) -> dict[str, tuple[Path, Path]] | None:
    """The four files, all of the same folder; None if no folder has any of them.

    Raises InputError if the first folder that has any of them lacks another.
    """
    for folder in _folders(source, root, root_given):
        found = {name: _file(folder, name) for names in FILES.values() for name in names}
        if any(found.values()):
            lacking = [name for name, path in found.items() if path is None]
            if lacking:
                raise InputError(
                    f"{source.title} is incomplete: {folder} lacks {', '.join(lacking)} (with or without "
                    f".gz). Add "
                    "what is missing, or delete the folder's other files to have it looked for elsewhere."
                )
            return {split: (found[images], found[labels]) for split, (images, labels) in FILES.items()}
    return None


def _folders(source: Source, root: Path, root_given: bool) -> Iterator[Path]:
    """Folders to look in, best first; `root` itself counts only if the user named it."""
    below_root = root / source.torchvision / "raw"
    if root_given:
        yield root
        yield below_root
    if source.package_folder is not None:
        for prefix in dict.fromkeys(package_prefixes()):
            yield prefix / "share" / "datasets" / source.package_folder
    if not root_given:
        yield below_root


def package_prefixes() -> list[Path]:
    """Where system packages are installed."""
    return [Path("/usr"), Path(sys.prefix), Path(sys.base_prefix)]


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read(source: Source, split: str, images: Path, labels: Path) -> Split:
    x, y = read_idx(images, dimensions=3), read_idx(labels, dimensions=1)
    if len(x) != len(y):
        raise InputError(
            f"{source.title} ({split}): {images} has {len(x)} images, but {labels} has {len(y)} labels. The "
            f"two "
            "belong to different data sets; get both again."
        )
    return checked_split(x.to(torch.float32).div_(255), y.to(torch.int64), f"{source.title} ({split})")


def _download(source: Source, root: Path, root_given: bool) -> None:
    data_sets = import_torchvision().datasets
    try:
        getattr(data_sets, source.torchvision)(str(root), download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise _missing(source, root, root_given, f"its download failed ({error})") from error


def _missing(source: Source, root: Path, root_given: bool, why: str) -> InputError:
    looked = ", ".join(str(folder) for folder in _folders(source, root, root_given))
    return InputError(
        f"{source.title} was not found in {looked}, and {why}. To mend it, {source.remedy}put its four "
        f"*-ubyte.gz "
        f"files into {root / source.torchvision / 'raw'}, or set the option root (or the environment "
        f"variable "
        "CERTPRUNE_DATA) to a folder that torchvision filled."
    )
