"""Training steps by each bound, against plain training and auto_LiRPA: ratios, measured in one process.

    python benchmarks/bounds.py [--json FILE] [--compile] [--rounds 7] [--threads 2] [--only cnn_large]

A step is forward pass, loss, backward pass and Adam, on random images of 1x28x28, in float32. Each bound's loss is
the robust loss alone; `--clean` adds a clean cross-entropy to each, as a recipe with kappa below 1 has it. The
columns are interleaved: every round takes one step of each, so that a busy machine slows all of them alike; the
figures are medians over rounds, ratios are taken within a round. Not part of the tests.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers.bounds import fused_cross_entropy, margin_lower_bounds, trace, worst_case_cross_entropy  # noqa: E402
from certifiers.bridges import import_auto_lirpa  # noqa: E402
from certifiers.errors import InputError  # noqa: E402
from certifiers.threat import LinfBall  # noqa: E402
from certprune.models import build_model  # noqa: E402

CASES = {"cnn_small": 256, "cnn_large": 64}  # model: batch
SHAPE, CLASSES, EPS = (1, 28, 28), 10, 0.1
PLAIN, FUSED, ROWS = "plain", "fused CROWN-IBP", "CROWN-IBP, K-1 rows"
THEIR_ROWS, THEIR_FUSED = "auto_LiRPA CROWN-IBP, K-1 rows", "auto_LiRPA CROWN-IBP, fused"

Loss = Callable[[], Tensor]


class ExponentialMargins(nn.Module):
    """sum_j exp(logit[j] - logit[y]), whose logarithm is the cross-entropy: what auto_LiRPA's loss fusion bounds.

    The label's logit is picked by a one-hot product, since the `gather` of auto_LiRPA's own wrapper does not come
    through current torch's tracer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.exp(logits - (logits * label).sum(-1, keepdim=True)).sum(-1, keepdim=True)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    return lambda: F.cross_entropy(model(x), y)


def ours_by(method: str) -> Callable[[nn.Module, Tensor, Tensor], Loss]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        def loss() -> Tensor:
            margins = margin_lower_bounds(model, x, y, LinfBall(EPS), method=method)
            return worst_case_cross_entropy(margins, y).mean()

        return loss

    return make


def ours_fused(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    return lambda: fused_cross_entropy(model, x, y, LinfBall(EPS)).mean()


def their_input(lirpa, x: Tensor):
    lower, upper = LinfBall(EPS).box(x)
    return lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=float("inf"), eps=EPS, x_L=lower, x_U=upper))


def their_rows(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    lirpa = import_auto_lirpa()
    bounded = lirpa.BoundedModule(model, x, device=x.device)
    bounded.train()
    label = F.one_hot(y, CLASSES)
    others = torch.eye(CLASSES, device=x.device).expand(len(x), -1, -1)[label == 0].view(len(x), CLASSES - 1, CLASSES)
    rows = label.unsqueeze(1) - others

    def loss() -> Tensor:
        margins = bounded.compute_bounds(x=(their_input(lirpa, x),), C=rows, method="CROWN-IBP", bound_upper=False)[0]
        return F.cross_entropy(F.pad(-margins, (1, 0)), torch.zeros_like(y))  # the label's own margin, 0, in front

    return loss


def their_fused(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    lirpa = import_auto_lirpa()
    label = F.one_hot(y, CLASSES).to(x.dtype)
    bounded = lirpa.BoundedModule(
        ExponentialMargins(model), (x, label), bound_opts={"loss_fusion": True}, device=x.device
    )
    bounded.train()
    exponential = next(node for node in bounded.modules() if type(node).__name__ == "BoundExp")

    def loss() -> Tensor:
        _, upper = bounded.compute_bounds(x=(their_input(lirpa, x), label), method="CROWN-IBP", bound_lower=False)
        return (upper.log() + exponential.max_input).mean()  # all was divided by exp(max_input) against overflow

    return loss


COLUMNS: dict[str, Callable[[nn.Module, Tensor, Tensor], Loss]] = {
    PLAIN: plain,
    "IBP": ours_by("ibp"),
    ROWS: ours_by("crown-ibp"),
    FUSED: ours_fused,
    THEIR_ROWS: their_rows,
    THEIR_FUSED: their_fused,
}
COMPILED = (PLAIN, "IBP", ROWS, FUSED)


def steps(name: str, batch: int, compiled: bool, clean: bool) -> dict[str, Callable[[], float]]:
    """For each column a function that takes one training step and returns its loss; same weights and data for all."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, *SHAPE), torch.randint(CLASSES, (batch,))
    torch.manual_seed(0)
    weights = build_model(name, SHAPE, CLASSES).state_dict()

    def step(make: Callable[[nn.Module, Tensor, Tensor], Loss], compile_it: bool) -> Callable[[], float]:
        model = build_model(name, SHAPE, CLASSES)
        model.load_state_dict(weights)
        trace(model, SHAPE)
        loss = make(model, x, y)
        loss = torch.compile(loss) if compile_it else loss
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

        def take() -> float:
            optimiser.zero_grad(set_to_none=True)
            value = loss()
            total = value + F.cross_entropy(model(x), y) if clean and make is not plain else value
            total.backward()
            optimiser.step()
            return value.item()

        return take

    made = {column: step(make, False) for column, make in COLUMNS.items()}
    if compiled:
        made |= {f"{column}, compiled": step(COLUMNS[column], True) for column in COMPILED}
    return made


def measure(columns: dict[str, Callable[[], float]], rounds: int, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Median milliseconds, median ratios within a round, and the loss at the first step."""
    first = {name: take() for name, take in columns.items()}
    for _ in range(warm_up - 1):
        for take in columns.values():
            take()
    seconds: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(rounds):
        for name, take in columns.items():
            start = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "milliseconds": 1000 * statistics.median(times),
            "times plain": _ratio(times, seconds[PLAIN]),
            "times fused": _ratio(times, seconds[FUSED]),
            "loss": first[name],
        }
        for name, times in seconds.items()
    }


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(t / other for t, other in zip(times, others, strict=True))


def show(console: Console, case: str, figures: dict[str, dict[str, float]]) -> None:
    table = Table(title=case, title_justify="left")
    for heading in ("step", "ms", "x plain", "x fused", "first loss"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, row in figures.items():
        ratios = f"{row['times plain']:.2f}", f"{row['times fused']:.2f}"
        table.add_row(name, f"{row['milliseconds']:.1f}", *ratios, f"{row['loss']:.3f}")
    console.print(table)


def markdown(report: dict) -> str:
    """The report as a page for results/."""
    lines = [
        "# What a training step by each bound costs",
        "",
        f"Made by `python {' '.join(sys.argv)}`: forward pass, loss, backward pass and Adam on random 1x28x28 images, "
        f"float32, eps {EPS}; interleaved rounds in one process, medians of {report['rounds']}; ratios are taken "
        f"within a round. torch {report['torch']}, auto_LiRPA {report['auto_LiRPA']}, {report['threads']} threads, "
        f"{report['machine']}. auto_LiRPA's fused loss is its own, with a one-hot product for the `gather` that does "
        "not trace. The first loss is the bound at the first weights: lower is tighter.",
    ]
    for case, figures in report["cases"].items():
        lines += [
            "",
            f"## {case}",
            "",
            "| Step | ms | x plain | x our fused | First loss |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {row['milliseconds']:.1f} | {row['times plain']:.2f} | {row['times fused']:.2f} "
            f"| {row['loss']:.4g} |"
            for name, row in figures.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--only", choices=CASES, help="one of the models alone")
    parser.add_argument("--compile", action="store_true", help="add columns under torch.compile")
    parser.add_argument("--clean", action="store_true", help="add a clean cross-entropy to every robust loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write them there as Markdown")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console()
    report = {
        "torch": torch.__version__,
        "auto_LiRPA": import_auto_lirpa().__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "clean": arguments.clean,
        "cases": {},
    }
    for name, batch in CASES.items():
        if arguments.only not in (None, name):
            continue
        columns = steps(name, batch, arguments.compile, arguments.clean)
        figures = measure(columns, arguments.rounds)
        show(console, f"{name}, batch {batch}, eps {EPS}, {torch.get_num_threads()} threads", figures)
        report["cases"][f"{name}, batch {batch}"] = figures
    if arguments.out:
        arguments.out.write_text(markdown(report))
        console.print(f"Written to {arguments.out}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"Written to {arguments.json}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
