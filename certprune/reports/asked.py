"""How many images a recipe asks to be certified, from the recipe alone: no data set is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Training and test images as they are published; of sets without a test split, all images and the usual test share.
PUBLISHED: dict[str, tuple[int, int | float]] = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "digits": (1_797, 0.2),
    "fashion-mnist": (60_000, 10_000),
    "mnist": (60_000, 10_000),
    "mnist-5k": (5_000, 0.2),
    "svhn": (73_257, 26_032),
    "tiny-imagenet": (100_000, 10_000),
}


def asked_count(config: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> int | None:
    """How many images of its split a recipe asks for: ``count``, else all of them; None where nothing tells.

    ``settings``: those of smoothing; default: those of bounds.
    """
    certify = config.get("certify") or {}
    count = (certify if settings is None else settings).get("count")
    size = split_size(config.get("data") or {}, str(certify.get("split") or "test"))
    return min((n for n in (count, size) if n is not None), default=None)


def split_size(data: Mapping[str, Any], split: str) -> int | None:
    """How many images a split of a recipe's data has; None for images of one's own, and ImageNet's folders."""
    if not isinstance(data, Mapping) or data.get("name") not in PUBLISHED:
        return None
    train, test = PUBLISHED[data["name"]]
    if isinstance(test, float):
        whole, test = train, _share(train, data.get("test", test))
        train = whole - test
    if split == "test":
        return test
    if data.get("with_extra") or (split == "train" and data.get("extra")):
        return None
    validation = _share(train, data.get("validation", 0.1))
    return validation if split == "validation" else train - validation


def of_asked(held: int, asked: int | None) -> str:
    """How many images are held, and of how many where that is not all: "20 of 500"."""
    return f"{held:,} of {asked:,}" if asked is not None and held < asked else f"{held:,}"


def fewer(counts: Iterable[int], asked: int | None) -> str:
    """A sentence where a table's ledgers do not all have the images that the recipe asks for, else ""."""
    if asked is None or min(counts) >= asked:
        return ""
    return f" Not every network is certified on the {asked:,} images that the recipe asks for."


def asked_images(count: int | None, held: Sequence[frozenset[int]]) -> frozenset[int]:
    """The indices asked for: the first ``count``; where that is not known, all that any of the ledgers has."""
    return frozenset().union(*held) if count is None else frozenset(range(count))


def needed_images(count: int | None, held: Sequence[frozenset[int]]) -> frozenset[int]:
    """What a ledger must have to count beside others of its run: the images asked for that the fullest of them has.

    ``held``: the indices of each of them. Where all were cut alike, no more is needed than they all have.
    """
    asked = asked_images(count, held)
    fullest = max((asked & indices for indices in held), key=len, default=frozenset())
    return fullest or max(held, key=len, default=fullest)


def _share(count: int, fraction: float) -> int:
    """As scikit-learn's ``train_test_split`` rounds."""
    return math.ceil(float(fraction) * count)
