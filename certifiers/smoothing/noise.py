"""Noise that depends on the seed and the input's number alone: not on batches, order, shards or resumption.

Each input has random streams of its own, one for each purpose, seeded by a hash of (seed, index, purpose). A stream
is read in blocks of :data:`BLOCK` samples, each filled by one call of the generator, so that sample k of an input is
the same to the bit however many blocks are held in memory at once, and whatever n is. (Reading in chunks of any size
would not do: torch's generators draw differently for other sizes of a call, on a GPU always.) Another kind of device
draws other numbers.

Inputs may also share one stream (index :data:`SHARED`): then its noise is drawn once for all of them. Each input's
samples are as independent of one another as before, so each certificate holds with its probability as before; but
those of different inputs are no longer independent of each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 100  # samples; divides the usual n0 and n, so that nothing is drawn in vain
SHARED = "shared"


def stream(seed: int, index: int | str, purpose: str, device: torch.device) -> torch.Generator:
    """The generator of one input's noise, at its start; streams of other purposes are independent of it."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def fill_gaussian(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Overwrite `out` (samples, ...), whole blocks, with the next samples of N(0, sigma^2) in every entry."""
    for block in out.split(BLOCK):
        block.normal_(0.0, sigma, generator=generator)


def fill_uniform(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """The same with samples of U[-w, w], w = sqrt(3) sigma, whose standard deviation is sigma."""
    width = math.sqrt(3.0) * sigma
    for block in out.split(BLOCK):
        block.uniform_(-width, width, generator=generator)


FILLS: dict[str, Callable[[Tensor, float, torch.Generator], None]] = {
    "gaussian": fill_gaussian,
    "uniform": fill_uniform,
}
