"""A content hash of a network, by which a ledger knows whose verdicts it holds."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn


def model_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the architecture and of the names, dtypes, shapes and bytes of all tensors.

    Buffers that are not saved with the weights count too (normalisation may live there). The same on every
    device and in every process, and in train and eval mode; any changed bit changes it, so that the two zeros
    of opposite sign differ.
    """
    digest = hashlib.sha256()
    # A printed module may hold memory addresses of functions, which differ from process to process.
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
    tensors = dict(model.state_dict())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name not in tensors})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # extra state of a module
            digest.update(f"\n{name} {tensor!r}\n".encode())
            continue
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
