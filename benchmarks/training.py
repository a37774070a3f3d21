"""Images a second of a training step by each objective, as it is and compiled, beside auto_LiRPA's CROWN-IBP.

    python benchmarks/training.py [-o results/training.md] [--rounds 9] [--threads 2] [--device cpu] [--no-compile]

A step is all that the training loop does with a batch: forward and backward pass and Adam, on random 3x32x32 images,
in float32, by the recipe's own code for steps. On the CPU, and on the GPU where there is one. Columns are interleaved:
every round takes one step of each, so that a busy machine slows all of them alike; figures are medians over rounds,
ratios are taken within a round. What a column cannot do here (a compiler that is missing, an operation that auto_LiRPA
does not take) leaves it out, with the reason. Not part of the tests.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bounds import (  # noqa: E402
    CLASSES,
    EPS,
    FUSED,
    PLAIN,
    THEIR_FUSED,
    THEIR_ROWS,
    measure,
    their_fused,
    their_rows,
)
from certifiers.bridges import import_auto_lirpa  # noqa: E402
from certprune.initialisation import initialise  # noqa: E402
from certprune.models import build_model  # noqa: E402
from certprune.objectives import build_objective  # noqa: E402
from certprune.progress import Progress  # noqa: E402
from certprune.provenance import hardware  # noqa: E402
from certprune.speed import Step  # noqa: E402
from certprune.stage_settings import SpeedSettings  # noqa: E402

CASES = {"cpu": {"cnn_small": 128, "cnn7": 16}, "cuda": {"cnn_small": 256, "cnn7": 256}}  # model: batch
SHAPE = (3, 32, 32)
ALONE = {"kappa": {"start": 0.0, "end": 0.0}}  # the robust loss alone, as auto_LiRPA's column has it
MIXTRAIN = "MixTrain, 5 images"
TOO_LARGE = {"cnn7": "symbolic intervals keep 3,072 coefficients for each of its units: gigabytes an image"}
OBJECTIVES = {
    PLAIN: {"name": "benign"},
    "adversarial, 7 steps": {"name": "adversarial", "eps": EPS, "steps": 7},
    "gaussian": {"name": "gaussian", "sigma": 0.25},
    "IBP": {"name": "ibp", "eps": EPS, **ALONE},
    FUSED: {"name": "crown_ibp", "eps": EPS, "beta": {"start": 1.0, "end": 1.0}, **ALONE},
    MIXTRAIN: {"name": "mixtrain", "eps": EPS, "probability": 1.0},
}
THEIRS = {THEIR_ROWS: their_rows, THEIR_FUSED: their_fused}

Take = Callable[[], float]


class Reasons(Progress):
    """Why steps could not be compiled."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def network(name: str, device: torch.device) -> nn.Module:
    model = build_model(name, SHAPE, CLASSES)
    initialise(model, "ibp", 0)
    return model.to(device).train()


def stepping(model: nn.Module, gradient: Callable[[], Tensor]) -> Take:
    """A whole step with Adam; `gradient` fills in the gradients and gives the loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)

    def take() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = gradient()
        optimiser.step()
        return loss.item()  # a GPU has then done all of it

    return take


def ours(settings: dict, model: nn.Module, x: Tensor, y: Tensor, compiled: bool, said: Reasons) -> Take:
    step = Step(model, build_objective(settings), SpeedSettings(compile=compiled), progress=said)
    return stepping(model, lambda: step(x, y, 1.0)[0]["loss"])


def theirs(make: Callable, model: nn.Module, x: Tensor, y: Tensor) -> Take:
    loss = make(model, x, y)

    def gradient() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return stepping(model, gradient)


def columns(name: str, batch: int, device: torch.device, compiled: bool) -> tuple[dict[str, Take], dict[str, str]]:
    """What can be measured here, each tried once; and why the others cannot."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, *SHAPE, device=device), torch.randint(CLASSES, (batch,), device=device)
    made: dict[str, Take] = {}
    left_out: dict[str, str] = {}
    for title, settings in OBJECTIVES.items():
        if title == MIXTRAIN and name in TOO_LARGE:
            left_out[title] = TOO_LARGE[name]
            continue
        made[title] = ours(settings, network(name, device), x, y, False, Reasons())
        if compiled:
            said = Reasons()
            take = ours(settings, network(name, device), x, y, True, said)
            take()
            if said.said:
                left_out[f"{title}, compiled"] = said.said[0]
            else:
                made[f"{title}, compiled"] = take
    for title, make in THEIRS.items():
        try:
            take = theirs(make, network(name, device), x, y)
            take()
            made[title] = take
        except Exception as error:  # of another library: of any kind
            left_out[title] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return made, left_out


def table_of(figures: dict[str, dict[str, float]], batch: int) -> list[tuple[str, ...]]:
    return [
        (name, f"{1000 * batch / row['milliseconds']:,.0f}", f"{row['milliseconds']:.1f}")
        + (f"{row['times plain']:.2f}", f"{row['times fused']:.2f}")
        for name, row in figures.items()
    ]


HEADINGS = ("Step", "Images/s", "ms", "x plain", "x our fused")


def show(console: Console, case: str, rows: list[tuple[str, ...]], left_out: dict[str, str]) -> None:
    table = Table(title=case, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "Step" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name} ({reason})", markup=False, highlight=False)


def markdown(rounds: int, cases: dict[str, tuple[list[tuple[str, ...]], dict[str, str]]]) -> str:
    """All cases as a page for results/."""
    machine = hardware("cuda" if any(case.startswith("cuda") for case in cases) else "cpu")
    lines = [
        "# Images a second in training",
        "",
        f"Made by `python {' '.join(sys.argv)}`: forward and backward pass and Adam on random 3x32x32 images, float32, "
        f"eps {EPS}, interleaved rounds in one process, medians of {rounds}; ratios are taken within a round. torch "
        f"{torch.__version__}, auto_LiRPA {import_auto_lirpa().__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads of {machine['processor']}"
        + (f", {machine['gpu']}" if "gpu" in machine else "")
        + ".",
    ]
    for case, (rows, left_out) in cases.items():
        lines += ["", f"## {case}", "", f"| {' | '.join(HEADINGS)} |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += [""] * bool(left_out) + [f"- Left out: {name} ({reason})" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--device", choices=CASES, help="this one alone (default: CPU, and GPU where there is one)")
    parser.add_argument("--only", choices=CASES["cpu"], help="one of the models alone")
    parser.add_argument("--batch", type=int, help="images in a batch (default: by model and device)")
    parser.add_argument("--no-compile", action="store_true", help="no columns under torch.compile")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the figures there too, as Markdown")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console, cases = Console(), {}
    for device in [arguments.device] if arguments.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        for name, batch in CASES[device].items():
            if arguments.only not in (None, name):
                continue
            batch = arguments.batch or batch
            made, left_out = columns(name, batch, torch.device(device), not arguments.no_compile)
            case = f"{device}: {name}, batch {batch}"
            # Each new compiled step makes torch.compile forget the others: these compile again in the warm-up.
            cases[case] = (table_of(measure(made, arguments.rounds, warm_up=2), batch), left_out)
            show(console, case, *cases[case])
    if arguments.out:
        arguments.out.write_text(markdown(arguments.rounds, cases))
        console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
