"""Files that are either wholly there or not there at all.

Every write goes to a temporary file in the same folder, is flushed to the disk, and is renamed over its name:
a process killed at any moment leaves the old file or the new one, never half of either. Nothing here pickles:
weights and masks are safetensors, and training state is read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certifiers.errors import InputError
from certifiers.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, atomically; what is not finite becomes ``null``."""
    write_text(path, json.dumps(plain(value), indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically (the whole file each time)."""
    write_text(path, "".join(json.dumps(plain(row)) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The JSON document at ``path``; :class:`InputError` if it is not one."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} should be a JSON file written by certprune, but it cannot be read ({error}). "
            f"Delete the folder {path.parent} to have that part made again."
        ) from error


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: floats that are not finite become ``None``, tuples lists, paths text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically. Equal tensors give equal bytes."""
    from safetensors.torch import save

    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    write_bytes(path, save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; :class:`InputError` if missing, cut short or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"There is no weights file {path}. Run the stage that makes it (certprune run), or give another path."
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} should be a safetensors file, but it is damaged or of another kind ({error}). "
            f"Nothing was changed. Restore the file from a copy, or delete the stage's folder {path.parent} "
            f"and "
            "run again to train that stage anew."
        ) from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nest of tensors and plain values with ``torch.save``, atomically."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path, device: Any = "cpu") -> dict[str, Any]:
    """What :func:`write_state` wrote; :class:`InputError` if the file is cut short or not one of ours."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as training state ({reason}). {_REMEDY.format(path=path)}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not training state. {_REMEDY.format(path=path)}")
    return state


_REMEDY = "Nothing was changed. Delete {path} to start this stage anew, or give another output=."
