"""The user's own data: a folder of images, or a function of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy

from certifiers.errors import InputError
from certprune.data.splits import Split, checked_split
from certprune.registry import check_options, import_callable

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}
ORDER_SEED = 0


def from_function(path: str, options: dict) -> dict[str, Split]:
    """What the callable "package.module:callable" returns: (train, test) or (train, validation, test).

    Each is a pair (images, labels) of arrays or tensors, as in :func:`checked_split`. `options` are passed
    on.
    """
    function = import_callable(path, "data function")
    check_options(function, options, f"The data function {path!r}")
    result = function(**options)
    names = {2: ("train", "test"), 3: ("train", "validation", "test")}
    if not isinstance(result, (tuple, list)) or len(result) not in names:
        came = f"{len(result)} parts" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"
        raise InputError(
            f"The data function {path!r} must return (train, test) or (train, validation, test), each a "
            f"pair (images, "
            f"labels), but {came} came."
        )
    splits = {}
    for name, pair in zip(names[len(result)], result, strict=True):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"The data function {path!r}: {name} must be a pair (images, labels).")
        splits[name] = checked_split(*pair, f"{path} ({name})")
    return splits


def from_folder(
    root: Path, size: int | Sequence[int] | None = None, channels: int | None = None
) -> tuple[dict[str, Split], int]:
    """(splits, number of classes) of root/train/CLASS/*.png, root/test/... and, if there is one,
    root/validation.

    Classes are numbered in the order of their sorted folder names in train. `size` (one number, or [height,
    width]) resizes every image, bilinearly; without it they must all be of one size. `channels` is 1 (grey)
    or 3; without it, as the first image. The images of a split come in an order that is shuffled once and for
    all, so that the first n are a fair sample. Raises InputError for missing folders, classes that training
    does not have, images that cannot be read, and sizes that differ.
    """
    height_width = _checked_size(size)
    if channels not in (None, *MODES):
        raise InputError(f"channels must be 1 (grey) or 3 (colour), but {channels!r} came.")
    for needed in ("train", "test"):
        if not (root / needed).is_dir():
            raise InputError(
                f"The data set 'folder' needs {root / needed}/CLASS/IMAGE.png, but there is no folder "
                f"{root / needed}. "
                "Set the option root to the folder that holds train and test."
            )
    classes = _classes(root / "train")
    splits: dict[str, Split] = {}
    for name in ("train", "validation", "test"):
        folder = root / name
        if not folder.is_dir():
            continue
        foreign = sorted(set(_classes(folder)) - set(classes))
        if foreign:
            raise InputError(
                f"{folder} has classes that {root / 'train'} has not: {', '.join(foreign)}. Training has: "
                f"{', '.join(classes)}."
            )
        paths = [(path, label) for label, c in enumerate(classes) for path in _images(folder / c)]
        order = numpy.random.RandomState(ORDER_SEED).permutation(len(paths))
        if channels is None:
            channels = 1 if _open(paths[0][0]).mode in ("1", "L") else 3
        arrays = [_pixels(paths[i][0], height_width, channels) for i in order]
        _check_one_size([paths[i][0] for i in order], arrays)
        splits[name] = checked_split(numpy.stack(arrays), [paths[i][1] for i in order], str(folder))
    return splits, len(classes)


def _checked_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise InputError(f"size must be a number of pixels, or [height, width], but {size!r} came.")
    return pair


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no folders: it needs one per class, named after it, with its images.")
    for name in names:
        if not _images(folder / name):
            raise InputError(f"{folder / name} has no images (files that end in {', '.join(SUFFIXES)}).")
    return names


def _images(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted; hidden files are not images."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _open(path: Path):
    from PIL import Image  # comes with torchvision

    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"The image {path} cannot be read: {error}. Mend it or take it away.") from error


def _pixels(path: Path, height_width: tuple[int, int] | None, channels: int) -> numpy.ndarray:
    """(channels, height, width), float32 in [0, 1]."""
    from PIL import Image

    with _open(path) as image:
        if image.mode[0] in "IF":
            raise InputError(
                f"The image {path} has more than 8 bits a pixel (mode {image.mode}). Convert it to 8 bits, "
                f"or load "
                "it with a function of yours (data set 'function')."
            )
        try:
            image = image.convert(MODES[channels])
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"The image {path} cannot be read: {error}. Mend it or take it away.") from error
        if height_width is not None and (image.height, image.width) != height_width:
            image = image.resize((height_width[1], height_width[0]), Image.Resampling.BILINEAR)
        pixels = numpy.asarray(image, dtype=numpy.float32) / 255
    return pixels[None] if channels == 1 else numpy.moveaxis(pixels, 2, 0)


def _check_one_size(paths: list[Path], arrays: list[numpy.ndarray]) -> None:
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise InputError(
                f"All images must be of one size, but {paths[0]} has (height, width) {arrays[0].shape[1:]} "
                f"and {path} "
                f"{array.shape[1:]}. Set the option size to resize them."
            )
