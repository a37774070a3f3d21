"""IDX files, the format of MNIST: a magic number, the sizes, then bytes; plain or gzipped.

0x00 0x00 0x08 (unsigned bytes) <number of dimensions>, each size as a big-endian uint32, the values
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy
import torch

from certifiers.errors import InputError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """The values, uint8, of an IDX file of unsigned bytes with that many dimensions.

    Raises InputError if the file cannot be read, is of another kind, or is not exactly as long as its sizes
    say.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            sizes = _sizes(header, dimensions, path)
            count = math.prod(sizes)
            content = file.read(count)
            longer = bool(file.read(1))
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise _damaged(path, f"it cannot be read ({error})") from error
    if len(content) != count or longer:
        came = "more" if longer else str(len(content))
        raise _damaged(path, f"{count} values were expected for the sizes {sizes}, but {came} came")
    return torch.from_numpy(numpy.frombuffer(content, dtype=numpy.uint8).reshape(sizes).copy())


def _sizes(header: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != expected:
        raise _damaged(path, f"it should begin with {expected.hex(' ')}, not with {header[:4].hex(' ') or 'nothing'}")
    if len(header) != 4 + 4 * dimensions:
        raise _damaged(path, "it ends within its header")
    return struct.unpack(f">{dimensions}I", header[4:])


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"The data file {path} is damaged or no IDX file: {why}. Delete it and get it again.")
