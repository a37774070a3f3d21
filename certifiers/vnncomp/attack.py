"""Search for a counterexample of a property: signed gradient descent into each of its polytopes.

Starts are diversified by a few steps along a random function of the outputs (Tashiro et al. 2020, arXiv 2003.06878):
from uniform starts alone, signed steps tend to end in the same corner.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from .network import OnnxNetwork
from .query import Box, Polytope, Property
from .witness import Witness

_SAMPLES = 256  # random inputs of a box
_WALK = 5  # steps of diversification
_CHUNK = 512  # points that descend at once


def confirmed(network: OnnxNetwork, question: Property, candidates: Tensor) -> Witness | None:
    """The first candidate (n, inputs) that the file itself, in onnxruntime, shows to be a counterexample.

    Candidates are brought into the nearest box first, in float32, the type the file computes in.
    """
    for candidate in candidates:
        for box in question.boxes:
            lower, upper = box.inner(torch.float32)
            x = torch.minimum(torch.maximum(candidate.float(), lower), upper)
            y = network.runtime(x.unsqueeze(0))[0]
            if question.is_counterexample(x, y):
                return Witness(x, y)
    return None


def attack(
    network: OnnxNetwork, question: Property, deadline: float, steps: int = 60, restarts: int = 10, seed: int = 0
) -> Witness | None:
    """A confirmed counterexample, or None if none was found before ``deadline`` (``time.monotonic``)."""
    generator = torch.Generator().manual_seed(seed)
    for box in question.boxes:
        for candidates in _descend(network.model, box, deadline, steps, restarts, generator):
            witness = confirmed(network, Property(question.inputs, question.outputs, (box,)), candidates)
            if witness is not None:
                return witness
            if time.monotonic() > deadline:
                return None
    return None


def _descend(model: nn.Module, box: Box, deadline: float, steps: int, restarts: int, generator: torch.Generator):
    """Candidates, chunk by chunk: (n, inputs), those whose output the model itself sees in a polytope."""
    lower, upper = box.inner(torch.float32)
    random = torch.rand(_SAMPLES, len(lower), generator=generator)
    points = torch.cat([((lower + upper) / 2).unsqueeze(0), lower + random * (upper - lower)])
    points = torch.minimum(torch.maximum(points, lower), upper)
    with torch.no_grad():
        outputs = model(points)
        excess = torch.stack([polytope.excess(outputs) for polytope in box.polytopes], 1)
    if (excess <= 0).any():
        yield points[(excess <= 0).any(1).nonzero().flatten()[:5]]
    # For each polytope: from the centre, from the best sample, and from others after a walk in a random direction.
    first = torch.stack([torch.zeros_like(excess[0], dtype=torch.long), excess.argmin(0)])
    others = torch.randint(len(points), (restarts, len(box.polytopes)), generator=generator)
    starts = torch.cat([first, others])
    targets = torch.arange(len(box.polytopes)).expand_as(starts).flatten()
    walks = 2 * torch.rand(starts.numel(), outputs.shape[1], generator=generator) - 1
    walks[: first.numel()] = 0.0
    for chunk in torch.arange(len(targets)).split(_CHUNK):
        chosen = [box.polytopes[i] for i in targets[chunk].tolist()]
        x = points[starts.flatten()[chunk]]
        yield _one_chunk(model, x, chosen, walks[chunk], (lower, upper), deadline, steps)


def _one_chunk(
    model: nn.Module,
    x: Tensor,
    polytopes: list[Polytope],
    walks: Tensor,
    ends: tuple[Tensor, Tensor],
    deadline: float,
    steps: int,
) -> Tensor:
    lower, upper = ends
    a, b = _stacked(polytopes, x)
    for step in range(-_WALK, steps + 1):
        x = x.detach().requires_grad_(step < steps)
        y = model(x)
        excess = (torch.einsum("prm,pm->pr", a, y) - b).amax(1)
        inside = (excess <= 0).nonzero().flatten()
        if len(inside) or step == steps or time.monotonic() > deadline:
            break
        loss = (walks * y).sum() if step < 0 else excess.sum()
        (gradient,) = torch.autograd.grad(loss, x)
        size = 0.25 * (upper - lower) * (1 - max(step, 0) / steps) ** 2
        x = torch.minimum(torch.maximum(x.detach() - size * gradient.sign(), lower), upper)
    return x.detach()[inside[:5]]


def _stacked(polytopes: list[Polytope], like: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of several polytopes as (points, rows, outputs) and (points, rows); short ones repeat their first."""
    most = max(len(p.b) for p in polytopes)
    rows = [[*range(len(p.b)), *[0] * (most - len(p.b))] for p in polytopes]
    a = torch.stack([p.a[r] for p, r in zip(polytopes, rows, strict=True)])
    b = torch.stack([p.b[r] for p, r in zip(polytopes, rows, strict=True)])
    return a.to(like), b.to(like)
