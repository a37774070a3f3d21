"""Noise that depends on the seed and the input's number alone: not on batches, order, shards or resumption.

Each input has random streams of its own, one for each purpose, seeded by a hash of (seed, index, purpose). A stream
is read in blocks of :data:`BLOCK` samples, each filled by one call of the generator, so that sample k of an input is
the same to the bit however many blocks are held in memory at once, and whatever n is. (Reading in chunks of any size
would not do: torch's generators draw differently for other sizes of a call, on a GPU always.) Another kind of device
draws other numbers. On a CPU torch takes 32 bits of a seed, so that among very many inputs two may share a stream:
each certificate holds as before, but those two depend on each other.

Inputs may also share one stream (index :data:`SHARED`): then its noise is drawn once for all of them. Each input's
samples are as independent of one another as before, so each certificate holds with its probability as before; but
those of different inputs are no longer independent of each other.

Noise and input lie on a grid, the multiples of a power of two s, fine enough for both and coarse enough that their sum
is exact. Otherwise that sum is rounded in a way that depends on the input, and a network that looks at its low bits
tells apart what the theorem takes to be alike (Jin et al. 2022, arXiv 2205.10159; Voracek and Hein 2022, arXiv
2207.07209). Let Q round *down* to the grid. For x on it, x + Q(noise) = Q(x + noise), and the theorem holds for the
network behind Q, around x. Not to the nearest: among floating point numbers ties are common, and broken to even they
show which multiples are even. What is assumed is that the generator draws Gaussian numbers: in single precision they
end near 6 sigma.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 100  # samples; divides the usual n0 and n, so that nothing is drawn in vain
SHARED = "shared"

_REACH = 8  # sigma: farther than the noise goes in single precision; in double it may, and sums are exact up to twice


def stream(seed: int, index: int | str, purpose: str, device: torch.device) -> torch.Generator:
    """The generator of one input's noise, at its start; those of other purposes are seeded by other hashes."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def grid(sigma: float, dtype: torch.dtype) -> float:
    """The spacing, in pixels, of the grid of inputs and noise: a power of two.

    2^e times the dtype's epsilon, e the least whole number with 1 + 8 sigma <= 2^e: input plus noise stays within 2^e,
    and multiples of the spacing up to 2^(e + 1) are numbers of the dtype, so that adding and rounding are exact.
    """
    mantissa, exponent = math.frexp(1.0 + _REACH * sigma)
    return math.ldexp(torch.finfo(dtype).eps, exponent - (mantissa == 0.5))


def snapped(x: Tensor, spacing: float) -> Tensor:
    """The point of the grid that is nearest to `x`, by half the spacing in each number at most; in [0, 1] if x is."""
    return (x / spacing).round_().mul_(spacing)


def fill_gaussian(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Overwrite `out` (samples, ...), whole blocks, with the next samples of N(0, sigma^2), rounded down to the grid.

    :func:`grid` of sigma and of `out`'s dtype.
    """
    spacing = grid(sigma, out.dtype)
    for block in out.split(BLOCK):
        block.normal_(0.0, sigma / spacing, generator=generator).floor_().mul_(spacing)


def fill_uniform(out: Tensor, sigma: float, generator: torch.Generator) -> None:
    """The same with samples of U[-w, w], w = sqrt(3) sigma, whose standard deviation is sigma; at most 0.1 % wider.

    As whole numbers: torch's uniform_ knows some ten points between two of the grid, here one more and there one less.
    random_ takes 32 random bits modulo the width, by which the likeliest number has a probability of at most
    (1 + 2^-10) / width, so much do they say about a move by one; that much wider, the theorem for w itself holds.
    """
    spacing = grid(sigma, out.dtype)
    half = math.ceil(math.sqrt(3.0) * sigma / spacing * (1.0 + 2.0**-10))
    for block in out.split(BLOCK):
        block.random_(-half, half, generator=generator).mul_(spacing)


FILLS: dict[str, Callable[[Tensor, float, torch.Generator], None]] = {
    "gaussian": fill_gaussian,
    "uniform": fill_uniform,
}
