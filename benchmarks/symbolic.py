"""Symbolic intervals with their gradient: our three ways, and HYDRA's; ratios measured in one process.

    python benchmarks/symbolic.py [--hydra CHECKOUT] [-o results/symbolic.md] [--rounds 7] [--threads 2]

One step is the worst-case cross-entropy of k random images at eps 0.1 and its gradient in the weights, for
`cnn_small` with its first weights. CHECKOUT is a copy of inspire-group/hydra, whose
`sym_interval_analyze` is run as it is; all losses must agree. Columns are interleaved round by round. Peak memory is
that of a process of its own, less what it holds before the step. Not part of the tests.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from certifiers.bounds import Region, propagate, trace, worst_case_cross_entropy  # noqa: E402
from certifiers.bounds.margins import margin_rows  # noqa: E402
from certifiers.bounds.symbolic import Symbolic  # noqa: E402
from certifiers.threat import LinfBall  # noqa: E402
from certprune.models import build_model  # noqa: E402

EPS, IMAGES = 0.1, (5, 20)
OURS = {"certprune": "cheapest", "rows alone": "rows", "forms alone": "forms"}
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(way: str) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        network = trace(model, tuple(x.shape[1:])).bind()
        rows, others = margin_rows(network, y, x)
        symbolic = Symbolic(network, propagate(network, Region.of(x, LinfBall(EPS))), way=way)
        margins = x.new_zeros(len(y), rows.shape[1] + 1).scatter(1, others, symbolic.lower_bounds(rows))
        return worst_case_cross_entropy(margins, y).mean()

    return loss


class _Torch:
    """torch for HYDRA's 2019 code, whose masks are uint8: today's must be bool."""

    def __getattr__(self, name: str):
        return torch.bool if name == "uint8" else getattr(torch, name)


class _Flatten(nn.Module):
    """HYDRA knows this layer by its class's name, and calls it with its own intervals."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def _for_hydra(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(_Flatten() if isinstance(layer, nn.Flatten) else layer for layer in model))


def _hydra(checkout: str):
    sys.path.insert(0, str(Path(checkout).resolve()))
    importlib.import_module("symbolic_interval.interval").torch = _Torch()
    return importlib.import_module("symbolic_interval.symbolic_network")


def hydra_margins(checkout: str) -> Callable[[nn.Module, float, Tensor, Tensor], Tensor]:
    """HYDRA's bounds as margins, ``(batch, classes)``, of an ``nn.Sequential``."""
    library = _hydra(checkout)

    def margins(model: nn.Module, eps: float, x: Tensor, y: Tensor) -> Tensor:
        return -library.Interval_Bound(_for_hydra(model), eps, method="sym", use_cuda=False)(x, y)

    return margins


def hydra(checkout: str) -> Loss:
    library = _hydra(checkout)
    return lambda model, x, y: library.sym_interval_analyze(_for_hydra(model), EPS, x, y, use_cuda=False)[0]


def case(images: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = build_model("cnn_small", (1, 28, 28), 10)
    x, y = torch.rand(images, 1, 28, 28), torch.randint(10, (images,))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])  # HYDRA cuts its box to the batch's range: make that [0, 1]
    return model, x, y


def step(loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.zero_grad()
    value = loss(model, x, y)
    value.backward()
    return value.item()


def measure(losses: dict[str, Loss], rounds: int, images: int) -> dict[str, list[float]]:
    """Seconds of every step, by column; the losses of all columns must agree."""
    model, x, y = case(images)
    values = {column: step(loss, model, x, y) for column, loss in losses.items()}
    expected = values["certprune"]
    for column, value in values.items():
        if abs(value - expected) > 1e-4 * max(1.0, abs(expected)):
            sys.exit(f"{column} gives the loss {value}, certprune {expected}: nothing to compare")
    seconds: dict[str, list[float]] = {column: [] for column in losses}
    for _ in range(rounds):
        for column, loss in losses.items():
            begin = time.perf_counter()
            step(loss, model, x, y)
            seconds[column].append(time.perf_counter() - begin)
    return seconds


def peak(column: str, images: int, threads: int, checkout: str | None) -> float:
    """MiB that one step needs at most, in a process of its own."""
    command = [sys.executable, __file__, "--peak", column, "--images", str(images), "--threads", str(threads)]
    command += ["--hydra", checkout] if checkout else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(loss: Loss, images: int) -> None:
    step(loss, *case(1))  # what is loaded once
    inputs = case(images)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    step(loss, *inputs)
    print(memory("VmHWM") - before)


def memory(key: str) -> float:
    """MiB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def page(rows: list[tuple[int, dict[str, list[float]], dict[str, float]]], arguments) -> str:
    columns = list(rows[0][1])
    lines = [
        "# Symbolic intervals: the cost of a loss and its gradient",
        "",
        f"`python benchmarks/symbolic.py{' --hydra CHECKOUT' if arguments.hydra else ''}`: `cnn_small`, eps {EPS}, "
        f"float32, {arguments.threads} threads, medians of {arguments.rounds} interleaved rounds; torch "
        f"{torch.__version__}, {platform.machine()}. In brackets: how many times certprune's time, the median of the "
        "rounds' ratios. \"rows alone\" carries every layer's rows backward, \"forms alone\" affine forms forward; "
        "certprune takes the cheapest way for each layer. Every column gives the same loss.",
        "",
        "| images | " + " | ".join(f"{c}, ms" for c in columns) + " | "
        + " | ".join(f"{c}, peak MiB" for c in columns) + " |",
        "|" + " --- |" * (1 + 2 * len(columns)),
    ]  # fmt: skip
    for images, seconds, peaks in rows:
        cells = [f"{1e3 * statistics.median(seconds['certprune']):.0f}"]
        for column in columns[1:]:
            ratios = [a / b for a, b in zip(seconds[column], seconds["certprune"], strict=True)]
            cells.append(f"{1e3 * statistics.median(seconds[column]):.0f} ({statistics.median(ratios):.1f} x)")
        cells += [f"{peaks[column]:.0f}" for column in columns]
        lines.append(f"| {images} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hydra", metavar="CHECKOUT")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    losses = {column: ours(way) for column, way in OURS.items()}
    if arguments.hydra:
        losses["HYDRA"] = hydra(arguments.hydra)
    if arguments.peak:
        return print_peak(losses[arguments.peak], arguments.images)
    rows = []
    for images in IMAGES:
        seconds = measure(losses, arguments.rounds, images)
        peaks = {column: peak(column, images, arguments.threads, arguments.hydra) for column in losses}
        rows.append((images, seconds, peaks))
    text = page(rows, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
