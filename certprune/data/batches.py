"""What the training loop is given: batches of an epoch, augmented, on the device, with the extra images' share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from certprune.data.augment import RESIZED_CROP, augmented
from certprune.data.images import FileImages
from certprune.data.splits import Data, Split


class Batches:
    """The training batches of `data`, `steps` of them in each epoch, each of `size` images.

    Images in memory are moved to `device` at once and stay there, and are augmented there. Images in files are read
    ahead by worker processes. Where there are extra images, each batch holds their share of them, drawn without
    replacement until all have had their turn; an epoch is one pass over the others. A last, smaller batch would weigh
    its images more: it sits the epoch out.
    """

    def __init__(self, data: Data, size: int, device: torch.device):
        self.x, self.y = data.train.x.to(device), data.train.y.to(device)
        self.device, self.augment = device, data.augment
        self.own = len(self.y) - data.extra
        share = round(size * data.extra_share) if data.extra else 0
        self.extra = min(max(share, 1), size - 1) if data.extra and size > 1 else 0
        self.size = min(size, self.own + self.extra)
        self.extra = min(self.extra, self.size - 1)
        self.steps = self.own // (self.size - self.extra)

    def epoch(self, generator: torch.Generator, replays: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches (x, y) in an order out of `generator`, each of the first ones `replays` times in a row.

        A replay is the same batch to the bit. Augmentation draws from torch's global generator.
        """
        numbers = self._numbers(generator)[: -(-self.steps // replays)]
        left = self.steps
        for x, chosen in self._images(numbers):
            x, y = augmented(x, self.augment), self.y[chosen]
            for _ in range(min(replays, left)):
                left -= 1
                yield x, y

    def _numbers(self, generator: torch.Generator) -> Tensor:
        """Image numbers, (steps, size), extra images last."""
        own = self.size - self.extra
        order = torch.randperm(self.own, generator=generator)[: self.steps * own].view(self.steps, own)
        if not self.extra:
            return order
        total, wanted = len(self.y) - self.own, self.steps * self.extra
        rounds = [torch.randperm(total, generator=generator) for _ in range(-(-wanted // total))]
        return torch.cat([order, self.own + torch.cat(rounds)[:wanted].view(self.steps, self.extra)], 1)

    def _images(self, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.x, FileImages):
            seed = int(torch.randint(2**62, ())) if RESIZED_CROP in self.augment else None
            for x, chosen in _read(self.x, numbers.tolist(), self.device, seed):
                yield x, chosen.to(self.device)
            return
        for chosen in numbers.to(self.device):
            yield self.x[chosen], chosen


def in_order(
    split: Split, size: int, device: torch.device, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of `split` in their order, as they are, in batches of `size` on `device`; the last may be smaller.

    `part` (i, n): of the batches only every n-th, from the i-th on.
    """
    starts = range(0, len(split.y), size)[part[0] :: part[1]]
    if isinstance(split.x, FileImages):
        numbers = [list(range(start, min(start + size, len(split.y)))) for start in starts]
        for x, chosen in _read(split.x, numbers, device, None):
            yield x, split.y[chosen].to(device)
        return
    for start in starts:
        yield split.x[start : start + size].to(device), split.y[start : start + size].to(device)


def _read(
    images: FileImages, batches: Iterable[list[int]], device: torch.device, seed: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, numbers) of each batch, read by `images.workers` processes; the views depend on the seed alone."""
    loader = DataLoader(
        _Views(images, seed),
        batch_sampler=list(batches),
        num_workers=images.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
    )
    for pixels, numbers in loader:
        yield pixels.to(device, non_blocking=True).to(torch.float32).div_(255), numbers


@dataclass(frozen=True)
class _Views(Dataset):
    images: FileImages
    seed: int | None

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        seed = None if self.seed is None else (self.seed + number * 0x9E3779B97F4A7C15) % 2**63
        return self.images.view.pixels(self.images.paths[number], seed), number

    def __len__(self) -> int:
        return len(self.images)
