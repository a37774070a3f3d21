"""Asking another verifier: a command that reads an ONNX file and a VNN-LIB file and prints a verdict."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .witness import parse_witness

#: Words by which verifiers say what they found, and what they mean; "holds" and "violated" are of older competitions.
_WORDS = {
    "unsat": "unsat",
    "holds": "unsat",
    "sat": "sat",
    "violated": "sat",
    "unknown": "unknown",
    "timeout": "timeout",
}
#: Seconds that a program has beyond its time to say that it found nothing.
GRACE = 5.0

_PLACES = ("onnx", "vnnlib", "timeout", "result")


@dataclass(frozen=True)
class ExternalAnswer:
    """``verdict``: "unsat", "sat", "unknown", "timeout" or "error"; ``note`` says why where it is not the first two.

    ``candidate``: the input (inputs,), float64, that came with "sat", not yet run through any network; or None.
    """

    verdict: str
    note: str
    seconds: float
    candidate: Tensor | None = None


def run_external(command: str, onnx: Path, vnnlib: Path, timeout: float, inputs: int) -> ExternalAnswer:
    """Run ``command`` on one instance; whatever the program does is an answer, never an exception.

    Args:
        command: with {onnx}, {vnnlib} and, if wanted, {timeout} (seconds) and {result}: a file where the program
            writes its verdict instead of printing it. It is split into words as a shell would; no shell runs it.
        timeout: seconds; the program gets :data:`GRACE` more to end by itself, then it is killed with all it started.
        inputs: how many numbers a counterexample has.

    Raises:
        InputError: a command without {onnx} or {vnnlib}, or a program that does not exist.
    """
    words = command_words(command)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.txt"
        values = {"onnx": onnx, "vnnlib": vnnlib, "timeout": f"{timeout:g}", "result": result}
        filled = [_fill(word, values) for word in words]
        begin = time.monotonic()
        code, printed, complaint = _run(filled, timeout + GRACE)
        seconds = time.monotonic() - begin
        text = result.read_text(errors="replace") if result.exists() else printed
    if code is None:
        return ExternalAnswer("timeout", f"killed after {seconds:.0f} s", seconds)
    verdict = _verdict(text)
    if verdict is None:
        last = (complaint.strip() or printed.strip() or "it printed nothing").splitlines()[-1]
        return ExternalAnswer("error", f"it ended with code {code} and no verdict: {last[:200]}", seconds)
    if verdict == "unsat" and code != 0:
        return ExternalAnswer("error", f"it printed {verdict} but ended with code {code}", seconds)
    candidate, note = None, ""
    if verdict == "sat":
        try:
            candidate = parse_witness(text, inputs)
            note = "" if candidate is not None else "it gave no counterexample"
        except InputError as error:
            note = str(error)
    return ExternalAnswer(verdict, note, seconds, candidate)


def command_words(command: str) -> list[str]:
    """The command's words; InputError if it cannot be split or has no {onnx} or {vnnlib}."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"The external command {command!r} cannot be split into words: {error}.") from error
    named = set(re.findall(r"{(\w*)}", command))
    if not {"onnx", "vnnlib"} <= named or not named <= set(_PLACES):
        raise InputError(
            f"The external command must hold {{onnx}} and {{vnnlib}}, and may hold {{timeout}} and {{result}}, but "
            f"it is {command!r}. For example: --external 'Marabou {{onnx}} {{vnnlib}} --timeout={{timeout}}'."
        )
    return words


def tool_name(command: str) -> str:
    """What the ledger calls the tool: the program's name, or the script's or module's that an interpreter runs."""
    words = command_words(command)
    name = Path(words[0]).name
    if re.fullmatch(r"python[\d.]*|bash|sh", name) and len(words) > 1:
        name = next((Path(word).stem for word in words[1:] if not word.startswith("-")), name)
    return re.sub(r"[^\w.-]+", "-", name)


def _fill(word: str, values: dict) -> str:
    return re.sub(r"{(\w+)}", lambda match: str(values[match[1]]), word)


def _verdict(text: str) -> str | None:
    """The last line that is a verdict and nothing else, punctuation and case aside."""
    found = [_WORDS.get(line.strip().strip("\"'.:").lower()) for line in text.splitlines()]
    return next((word for word in reversed(found) if word), None)


def _run(words: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: killed when the time was up), standard output and error."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(
            f"The external program {words[0]!r} cannot be started ({error.strerror}). Install it, or give "
            "its full path."
        ) from error
    try:
        printed, complaint = process.communicate(timeout=seconds)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return None, "", ""
        raise
    return process.returncode, printed, complaint


def _end(process: subprocess.Popen) -> None:
    """End the program and all it started; they are a group of their own."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
