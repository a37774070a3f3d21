"""One file for a compacted network: safetensors, whose header holds the description; with .gz at the end, compressed.

Nothing is pickled, and nothing but the layers of layers.py is ever built from a file.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.files import write_bytes
from certprune.compact.compaction import Compacted
from certprune.compact.layers import build

FORMAT = "certprune compacted network 1"
_KEY = "certprune"  # in the file's metadata; the only one, since safetensors shuffles several
_MAGIC = b"\x1f\x8b"  # of gzip


def file_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of these tensors; equal tensors give equal bytes."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, metadata)


def write_compacted(found: Compacted, path: str | Path) -> None:
    """Write ``found`` to ``path`` atomically; a name that ends in .gz gives a compressed file."""
    path = Path(path)
    header = {
        "format": FORMAT,
        "layers": found.description,
        "input_shape": list(found.input_shape),
        "classes": found.classes,
        "origin": found.origin,
    }
    content = file_bytes(found.model.state_dict(), {_KEY: json.dumps(header)})
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def is_compacted(path: str | Path) -> bool:
    """Whether the file says of itself that it is a compacted network; False if there is no such file."""
    path = Path(path)
    return path.is_file() and _header(_content(path)) is not None


def load_compacted(path: str | Path) -> nn.Module:
    """The network in a file of :func:`write_compacted`: plain, in eval mode. See :func:`read_compacted`."""
    return read_compacted(path).model


def read_compacted(path: str | Path) -> Compacted:
    """What :func:`write_compacted` wrote.

    Raises InputError for a file that is missing, damaged or of another kind, and for weights that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}. Write one with certprune compact RUN VARIANT -o {path}.")
    content = _content(path)
    header = _header(content)
    if header is None:
        raise InputError(
            f"{path} is not a compacted network. Give a file that certprune compact wrote, or make one with "
            "certprune compact RUN VARIANT -o FILE."
        )
    try:
        tensors = load(content)
        shape, classes = tuple(int(s) for s in header["input_shape"]), int(header["classes"])
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        model = build(header["layers"], tensors, dtype)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}). Make it anew with certprune compact.") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path} holds numbers that are not finite (in {name}), so nothing can be proven about it. Make it "
                "anew with certprune compact."
            )
    return Compacted(model, header["layers"], shape, classes, header.get("origin", {}))


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}). Restore it from a copy, or make it anew.") from error


def _header(content: bytes) -> dict[str, Any] | None:
    """What the file says about its network; None for anything that is not of our format."""
    try:
        size = int.from_bytes(content[:8], "little")
        found = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_KEY]) if size <= len(content) else {}
        return found if found.get("format") == FORMAT else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
