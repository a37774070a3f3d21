"""Images that are not float tensors in memory, but read like one: `x[index]` gives float32 in [0, 1].

Both kinds know `shape`, `len`, `select` (some of them, not read), `to` (a device) and `digest` (what they are).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from certifiers.errors import InputError


class ByteImages:
    """Images as bytes, (n, channels, height, width) uint8: a quarter of the memory, on the CPU or on a GPU.

    `x[index]` is exactly `pixels[index] / 255` in float32.
    """

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index) -> Tensor:
        return self.pixels[index].to(torch.float32).div_(255)

    def select(self, index: Tensor) -> ByteImages:
        return ByteImages(self.pixels[index])

    def to(self, device: torch.device) -> ByteImages:
        return ByteImages(self.pixels.to(device))

    def digest(self) -> bytes:
        return hashlib.sha256(numpy.ascontiguousarray(self.pixels.cpu().numpy()).data).digest()


@dataclass(frozen=True)
class View:
    """How a file becomes (3, size, size) pixels: the shorter side to `resize`, then the middle.

    `resize` None: the file has that size already. The random view, for training, is a part of 8 to 100 % of the
    area with sides 3:4 to 4:3, resized (Szegedy et al. 2015; torchvision's RandomResizedCrop).
    """

    size: int
    resize: int | None = None

    def pixels(self, path: Path, seed: int | None = None) -> Tensor:
        """(3, size, size) uint8; the random view of `seed`, the middle for None."""
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"The image {path} cannot be read: {error}. Mend it or take it away.") from error
        if seed is not None:
            image = self._random_part(image, seed)
        elif self.resize is not None:
            image = self._middle(image)
        if image.size != (self.size, self.size):
            raise InputError(
                f"The image {path} should be {self.size}x{self.size}, but is {image.width}x{image.height}. Get the "
                "data set again."
            )
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()

    def _middle(self, image):
        from PIL.Image import Resampling

        ratio = self.resize / min(image.size)
        sides = [max(self.size, round(side * ratio)) for side in image.size]
        image = image.resize(sides, Resampling.BILINEAR)
        left, top = ((side - self.size) // 2 for side in sides)
        return image.crop((left, top, left + self.size, top + self.size))

    def _random_part(self, image, seed: int):
        from PIL.Image import Resampling

        from certifiers.bridges import import_torchvision

        import_torchvision()
        from torchvision.transforms import RandomResizedCrop

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        box = (left, top, left + width, top + height)
        return image.resize((self.size, self.size), Resampling.BILINEAR, box=box)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that stay files until they are read, for sets that do not fit into memory; `workers` processes read."""

    paths: Sequence[Path]
    view: View
    workers: int = 0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), 3, self.view.size, self.view.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index) -> Tensor:
        if isinstance(index, int):
            return self.view.pixels(self.paths[index]).to(torch.float32).div_(255)
        numbers = range(len(self.paths))[index] if isinstance(index, slice) else index.tolist()
        if len(numbers) == 0:
            return torch.zeros((0, *self.shape[1:]))
        return torch.stack([self[number] for number in numbers])

    def select(self, index: Tensor) -> FileImages:
        return replace(self, paths=[self.paths[number] for number in index.tolist()])

    def to(self, device: torch.device) -> FileImages:
        return self

    def digest(self) -> bytes:
        """Of names and lengths: to read every file would take hours."""
        lines = (f"{path.parent.name}/{path.name} {path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256("".join(lines).encode()).digest()


def select(images: Tensor | ByteImages | FileImages, index: Tensor) -> Tensor | ByteImages | FileImages:
    """Some of the images, in the order of `index`, of the same kind; files are not read."""
    return images[index] if isinstance(images, Tensor) else images.select(index)
