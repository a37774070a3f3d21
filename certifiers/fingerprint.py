"""A content hash of a network, by which a ledger knows whose verdicts it holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))  # `training` among them
_PLAIN = (bool, int, float, complex, str, type(None))
_CONTAINERS = (tuple, list, dict, set, frozenset)
_DEEPEST = 50  # levels of containers in containers
_MADE_BY_TRACING = re.compile(r"_(tensor|param)_constant\d+")  # torch.fx leaves these on a model
_PRINTED = ("torch.", "torchvision.")  # packages whose modules print what they compute with


def plain_attributes(module: nn.Module, of_tensor: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The constants among the attributes of one module, those that every module has aside.

    Numbers, words and tuples of them as they are; of tensors ``of_tensor``; of arrays the bytes; and tuples, lists,
    dicts and sets that hold any of these, however nested, with ``...`` in the place of all else. Equal ones print the
    same in every process, if ``of_tensor`` does. What holds no constant is left out.
    """
    found = {}
    for key, value in vars(module).items():
        if key in _OF_MODULES:
            continue
        if not _is_plain(value):
            value = ... if _MADE_BY_TRACING.fullmatch(key) else _constants(value, of_tensor, {}, 0)
        if value is not ...:
            found[key] = value
    return found


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _constants(value: Any, of_tensor: Callable[[Tensor], Any], seen: dict[int, Any], depth: int) -> Any:
    """``value`` as what compares and prints by its constants, ``...`` where it has none.

    A dict of one entry says what is no number, word, tuple or list. ``seen``: by their addresses the containers that
    were met, so that cycles end and nothing is gone through twice.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return {"tensor": of_tensor(value)}
    if isinstance(value, numpy.ndarray | numpy.generic) and not value.dtype.hasobject:
        return {"array": (value.dtype.str, value.shape, value.tobytes())}
    if not isinstance(value, _CONTAINERS) or depth > _DEEPEST:
        return ...
    if id(value) not in seen:
        seen[id(value)] = ...
        members = value.values() if isinstance(value, dict) else value
        parts = [_constants(member, of_tensor, seen, depth + 1) for member in members]
        if any(part is not ... for part in parts):
            seen[id(value)] = _filled(value, parts, of_tensor)
    return seen[id(value)]


def _filled(container: Any, parts: list, of_tensor: Callable[[Tensor], Any]) -> Any:
    if isinstance(container, dict):  # in its own order, which a forward pass may go by
        keys = [_constants(key, of_tensor, {}, 0) for key in container]
        return {"dict": list(zip(keys, parts, strict=True))}
    if isinstance(container, set | frozenset):
        return {"set": sorted(map(repr, parts))}
    return tuple(parts) if isinstance(container, tuple) else parts


def _content(tensor: Tensor) -> tuple:
    """The dtype, the shape and a digest of the bytes; None for the digest where there are none (meta)."""
    try:
        dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
        digest = hashlib.sha256(_bytes(dense.resolve_conj().resolve_neg())).hexdigest()
    except (RuntimeError, TypeError):
        digest = None
    return str(tensor.dtype), tuple(tensor.shape), digest


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the architecture and of the names, dtypes, shapes and bytes of all tensors.

    The architecture: the module as it prints, and the constants among the attributes of modules of one's own: numbers,
    words, tensors and arrays, also in tuples, lists, dicts and sets (these in any order). What only the code of a
    forward pass says is not in it.
    Buffers that are not saved with the weights count too (normalisation may live there). The same on every
    device and in every process, and in train and eval mode; any changed bit changes it, so that the two zeros
    of opposite sign differ.
    """
    digest = hashlib.sha256()
    # A printed module may hold memory addresses of functions, which differ from process to process.
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(_PRINTED):
            for key, value in sorted(plain_attributes(module, _content).items()):
                digest.update(f"\n{name}.{key} {value!r}".encode())
    tensors = dict(model.state_dict())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name not in tensors})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # extra state of a module
            digest.update(f"\n{name} {tensor!r}\n".encode())
            continue
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()
