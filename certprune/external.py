"""What a ledger leaves undecided, asked of another verifier: the verdicts go to a ledger of their own beside it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.errors import InputError
from certifiers.threat import Threat, threat
from certifiers.verdict import UNDECIDED, Ledger, Status, Verdict, model_hash, read_ledger
from certifiers.vnncomp import ExternalAnswer, run_external, tool_name, write_instances
from certprune.asked import asked_images, shortfall
from certprune.progress import Progress
from certprune.runs import Run
from certprune.subjects import subject


def external_network(
    run: Run,
    network: str | Path,
    ledger: Path,
    data: Any,
    command: str,
    timeout: float,
    *,
    indices: range | None = None,
    progress: Progress | None = None,
) -> tuple[Path, list[str]]:
    """Ask ``command`` about the undecided images of ``ledger``; returns the new ledger and what went wrong, by image.

    The new ledger, ``…-external-NAME-60s.jsonl``, begins as a copy of the old one's rows; each that is undecided gives
    way to the program's verdict with the method ``external:NAME``: certified where it says unsat, falsified where its
    counterexample, brought into the threat set, changes the prediction of the network itself. An image on which the
    program ends without a verdict keeps its row, and the same command asks again; so whatever the program does, or
    when it is stopped, the ledger is of all images that the old one has. Images that the old one lacks are left out.

    Raises InputError for a command that cannot be run, for an l2 threat, and where another command line of the same
    name and time wrote the new ledger.
    """
    progress, name = progress or Progress(), f"external:{tool_name(command)}"
    header, before = read_ledger(ledger)
    asked = asked_images(run, data, indices, run.recipe.certify.count)
    rows = {verdict.index: verdict for verdict in before}
    path = ledger.with_name(f"{ledger.stem}-external-{tool_name(command)}-{timeout:g}s.jsonl")
    header = {**header, "method": f"{header['method']}+{name}", "external": command, "timeout": timeout}
    region = threat(header["norm"], header["eps"])
    about = subject(run, network)
    variant, model = about.name, about.model
    if header.get("model") != model_hash(model):
        raise InputError(
            f"The ledger {ledger} is not about the network {variant} as it is now; certify that one first."
        )
    troubles = []
    lacking = shortfall(rows, asked.numbers)
    if lacking:
        troubles.append(f"{ledger.name} is not whole: {lacking}; certify these first")
    with Ledger(path, {key: value for key, value in header.items() if key != "ledger"}) as found:
        found.append([rows[i] for i in asked.numbers if i in rows and i not in found.decided])
        here = [verdict for verdict in found.verdicts if verdict.index in asked.numbers]
        open_ = [verdict for verdict in here if verdict.status in UNDECIDED and verdict.method != name]
        progress.begin(f"{variant} · {name} eps {region.eps:g}", len(open_))
        for verdict in open_:
            place = asked.numbers.index(verdict.index)
            x, label = asked.x[place : place + 1], asked.y[place : place + 1]
            answer = _ask(model, x, label, region, command, timeout, verdict.index)
            _take_in(found, model, x[0], region, verdict, answer, name, troubles)
            progress.advance(1)
        left = {verdict.index for verdict in found.verdicts if verdict.status in UNDECIDED}
    decided = sum(verdict.index not in left for verdict in open_)
    progress.end(f"{decided} of {len(open_)} decided" if not troubles else f"{decided} decided, trouble: {troubles[0]}")
    return path, troubles


def _ask(
    model: nn.Module, x: Tensor, y: Tensor, region: Threat, command: str, timeout: float, index: int
) -> ExternalAnswer:
    with tempfile.TemporaryDirectory() as folder:
        lines = write_instances(model, x, y, region, folder, timeout=timeout, indices=[index])
        if not lines:
            raise InputError(
                f"Input {index} is predicted wrong here, but the ledger has it as predicted right: they are about "
                "different networks. Give the ledger of this network."
            )
        onnx, vnnlib = (Path(folder) / place for place in lines[0][:2])
        return run_external(command, onnx, vnnlib, timeout, x[0].numel())


def _take_in(
    ledger: Ledger,
    model: nn.Module,
    x: Tensor,
    region: Threat,
    before: Verdict,
    answer: ExternalAnswer,
    name: str,
    troubles: list[str],
) -> None:
    """Write what the answer shows about one input, if it does; what it does not show is said in ``troubles``."""
    statuses = {"unsat": Status.certified, "timeout": Status.timeout, "unknown": Status.unknown}
    status, note = statuses.get(answer.verdict), answer.note
    if answer.verdict == "sat":
        broken = answer.candidate is not None and _breaks(model, x, region, before.label, answer.candidate)
        status = Status.falsified if broken else Status.unknown
        note = "" if broken else note or "its counterexample does not change the network's prediction"
    if note:
        troubles.append(f"image {before.index}: {answer.verdict}, {note}")
    if status is None:
        return
    seconds = before.seconds + answer.seconds
    stages = {**before.stages, name: answer.seconds}
    ledger.settle(replace(before, status=status, method=name, margin=None, seconds=seconds, stages=stages))


@torch.no_grad()
def _breaks(model: nn.Module, x: Tensor, region: Threat, label: int, candidate: Tensor) -> bool:
    """Whether the candidate, brought into the threat set of ``x``, is predicted otherwise by the network itself."""
    point = region.project(x.unsqueeze(0), candidate.reshape(1, *x.shape).to(x.dtype))
    logits = model(point)
    inside = bool(region.contains(x.unsqueeze(0), point)[0])
    return inside and bool(logits.isfinite().all()) and int(logits.argmax()) != label
