"""The answer to a property of a network: attack, interval bounds, CROWN, a complete search, in order of cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds.graph import Network, trace
from ..errors import InputError
from .attack import attack, confirmed
from .bounding import Rows, excluded, excluded_by_combination, intervals_of, tightened
from .complete import Decide, complete
from .left import Left
from .network import OnnxNetwork, check_agreement
from .query import Box, Polytope, Property
from .witness import Witness


@dataclass(frozen=True)
class Answer:
    """``verdict``: "unsat" (no counterexample exists), "sat" (``witness`` is one), "unknown" or "timeout".

    ``method``: what decided, or the last one tried. ``seconds``: the time it took.
    """

    verdict: str
    method: str
    seconds: float
    witness: Witness | None = None


def verify(
    network: OnnxNetwork, question: Property, timeout: float, decide: Decide | None = None, seed: int = 0
) -> Answer:
    """Decide ``question`` about ``network`` in about ``timeout`` seconds (a stage in hand is finished).

    "unsat" rests on bounds in float64 that hold of the network in real arithmetic, rounding accounted for (its weights
    are those that float32 makes of constants, a Gemm's factors multiplied out); "sat" on onnxruntime.
    ``decide``: the complete search for what is left (None: complete.complete).

    Raises InputError where the property has other numbers of inputs or outputs than the network.
    """
    begin = time.monotonic()
    deadline = begin + timeout
    _check_fits(network, question)
    for box in question.boxes[:10]:
        lower, upper = box.inner(torch.float32)
        check_agreement(network, torch.stack([lower, upper, (lower + upper) / 2]))

    def answer(verdict: str, method: str, witness: Witness | None = None) -> Answer:
        return Answer(verdict, method, time.monotonic() - begin, witness)

    witness = attack(network, question, min(deadline, begin + max(timeout / 4, 1.0)), seed=seed)
    if witness is not None:
        return answer("sat", "attack", witness)
    exact = copy.deepcopy(network.model).double()
    bound = trace(exact, (network.inputs,)).bind()
    last, undecided = "attack", None
    for box in question.boxes:
        verdict, last, candidate = _decide_box(bound, exact, box, deadline, decide or complete)
        if candidate is not None:
            witness = confirmed(network, question, candidate.unsqueeze(0))
            if witness is not None:
                return answer("sat", last, witness)
            verdict = "unknown"  # rounding in the file undoes it, or the search is wrong
        if verdict == "timeout":
            return answer("timeout", last)
        undecided = undecided or (last if verdict != "unsat" else None)
    return answer("unknown", undecided) if undecided else answer("unsat", last)


def _decide_box(
    network: Network, model: nn.Module, box: Box, deadline: float, decide: Decide
) -> tuple[str, str, Tensor | None]:
    """Verdict, the method that gave it, and an input if the search found one."""
    intervals = intervals_of(network, box.lower.unsqueeze(0), box.upper.unsqueeze(0))
    left = _open(network, intervals, box.polytopes, "ibp")
    if not left:
        return "unsat", "ibp", None
    begin = time.monotonic()
    if begin > deadline:
        return "timeout", "ibp", None
    with torch.no_grad():
        intervals = tightened(network, intervals)
    spent = time.monotonic() - begin
    left = _open(network, intervals, left, "crown")
    left = [p for p in left if len(p.b) == 1 or not excluded_by_combination(network, intervals, p)]
    if not left:
        return "unsat", "crown", None
    if time.monotonic() + spent > deadline:  # a search begins with bounds like these
        return "timeout", "crown", None
    verdict, candidate = decide(Left(model, network, box.lower, box.upper, intervals, left, deadline))
    return verdict, "crown" if verdict == "unknown" else "search", candidate


def _open(network: Network, intervals, polytopes: Sequence[Polytope], method: str) -> list[Polytope]:
    out = excluded(network, intervals, Rows(polytopes), method)[0].tolist()
    return [polytope for polytope, done in zip(polytopes, out, strict=True) if not done]


def _check_fits(network: OnnxNetwork, question: Property) -> None:
    if (network.inputs, network.outputs) != (question.inputs, question.outputs):
        raise InputError(
            f"The property is about {question.inputs} inputs and {question.outputs} outputs, but the network has "
            f"{network.inputs} and {network.outputs}. Give the property that was written for this network."
        )
