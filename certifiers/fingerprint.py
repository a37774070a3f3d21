"""A content hash of a network, by which a ledger knows whose verdicts it holds."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))  # `training` among them
_PLAIN = (bool, int, float, complex, str, type(None))
_PRINTED = ("torch.", "torchvision.")  # packages whose modules print what they compute with


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and tuples among the attributes of one module, those that every module has aside."""
    return {key: value for key, value in vars(module).items() if key not in _OF_MODULES and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def model_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the architecture and of the names, dtypes, shapes and bytes of all tensors.

    The architecture: the module as it prints, and numbers, words and tuples among the attributes of modules of one's
    own. What only the code of a forward pass says is not in it.
    Buffers that are not saved with the weights count too (normalisation may live there). The same on every
    device and in every process, and in train and eval mode; any changed bit changes it, so that the two zeros
    of opposite sign differ.
    """
    digest = hashlib.sha256()
    # A printed module may hold memory addresses of functions, which differ from process to process.
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(_PRINTED):
            for key, value in sorted(plain_attributes(module).items()):
                digest.update(f"\n{name}.{key} {value!r}".encode())
    tensors = dict(model.state_dict())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name not in tensors})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # extra state of a module
            digest.update(f"\n{name} {tensor!r}\n".encode())
            continue
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
