"""What a network costs: parameters, multiply-adds, bytes."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from certifiers.bounds import trace
from certifiers.bounds.operations import Conv2d, Linear
from certprune.compact.files import file_bytes


@dataclass(frozen=True)
class Cost:
    """``parameters`` and buffers' entries, ``nonzero`` of them; of one input, ``multiply_adds`` that are carried out by
    convolutions and linear layers, and ``nonzero_multiply_adds`` among them whose weight is not zero; bytes of the
    weights as safetensors and of that file compressed (gzip)."""

    parameters: int
    nonzero: int
    multiply_adds: int
    nonzero_multiply_adds: int
    file_bytes: int
    compressed_bytes: int


def cost_of(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """The cost of a traceable model for inputs of ``input_shape`` (without the batch)."""
    network = trace(model, tuple(input_shape)).bind()
    executed = useful = 0
    with torch.no_grad():
        for node, operation in zip(network.nodes, network.operations, strict=True):
            if isinstance(operation, (Linear, Conv2d)):
                positions = prod(node.shape[1:])
                executed += positions * operation.weight.numel()
                useful += positions * int(operation.weight.count_nonzero())
    tensors = model.state_dict()
    content = file_bytes(tensors)
    return Cost(
        parameters=sum(t.numel() for t in tensors.values()),
        nonzero=sum(int(t.count_nonzero()) for t in tensors.values()),
        multiply_adds=executed,
        nonzero_multiply_adds=useful,
        file_bytes=len(content),
        compressed_bytes=len(gzip.compress(content, mtime=0)),
    )
