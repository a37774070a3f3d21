"""Noise that depends on the seed and the input's number alone: not on batches, order, shards or resumption.

Each input has random streams of its own, one for each purpose, seeded by a hash of (seed, index, purpose). A stream
is read in blocks of :data:`BLOCK` samples, each filled by one call of the generator, so that sample k of an input is
the same to the bit however many blocks are held in memory at once, and whatever n is. (Reading in chunks of any size
would not do: torch's generators draw differently for other sizes of a call, on a GPU always.) Another kind of device
draws other numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 100  # samples; divides the usual n0 and n, so that nothing is drawn in vain


def stream(seed: int, index: int, purpose: str, device: torch.device) -> torch.Generator:
    """The generator of one input's noise, at its start; streams of other purposes are independent of it."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def fill_gaussian(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Overwrite `out` (samples, ...), whole blocks, with the next samples of N(0, sigma^2) in every entry."""
    for block in out.split(BLOCK):
        block.normal_(0.0, sigma, generator=generator)
