"""The cascade beside auto_LiRPA's alpha-CROWN alone: what each decides on the same images, and its time.

    python benchmarks/certify.py RUN [--variant NAME ...] [--count 500] [--reference 20] [--hard 6] [-o FILE]

Both are attacked alike first. auto_LiRPA takes minutes for a handful of images on a CPU, so it is asked about
``--reference`` images, evenly spaced among the ``--count``, and about ``--hard`` of those that interval bounds leave
open, where the two differ at all; figures beside each other are about the same images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers import certify  # noqa: E402
from certifiers.methods import CASCADE  # noqa: E402
from certifiers.stages import DECIDED, summarise_stages  # noqa: E402
from certifiers.threat import threat  # noqa: E402
from certifiers.verdict import Status  # noqa: E402
from certprune.data import load_data  # noqa: E402
from certprune.runs import open_run  # noqa: E402

HEADINGS = ("Network", "Method", "Images", "Decided", "Certified", "Falsified", "Seconds", "Seconds / image")
REFERENCE = ("lirpa-alpha-crown",)


def main() -> None:
    torch.set_num_threads(1)
    asked = arguments()
    run = open_run(asked.run)
    recipe = run.recipe
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    eps = asked.eps if asked.eps is not None else recipe.eps_grid[0]
    rows, stages = [], []
    for name in asked.variant or [variant.name for variant in recipe.variants]:
        model = run.load_model(name)
        ball = threat(recipe.norm, eps)

        def timed(methods, numbers, model=model, ball=ball):
            x, y = data.test.x[numbers], data.test.y[numbers]
            certify(model, x[:1], y[:1], ball, "ibp")  # traced and warm
            begin = time.perf_counter()
            found = certify(model, x, y, ball, methods, attack_steps=40, attack_restarts=1, indices=numbers)
            return found, time.perf_counter() - begin

        found, seconds = timed(CASCADE, list(range(asked.count)))
        rows.append(row(name, "cascade", found, seconds))
        stages.append((name, summarise_stages(found, CASCADE)))
        spaced = list(range(0, asked.count, max(asked.count // max(asked.reference, 1), 1)))[: asked.reference]
        later = [v.index for v in found if "crown-ibp" in v.stages][: asked.hard]
        for kind, numbers in (("evenly spaced", spaced), ("left open by IBP", later)):
            if numbers:
                ours, theirs = timed(CASCADE, numbers), timed(REFERENCE, numbers)
                rows += [row(name, f"cascade, {kind}", *ours), row(name, f"auto_LiRPA alpha-CROWN, {kind}", *theirs)]
    show(rows, stages, asked.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--reference", type=int, default=20)
    parser.add_argument("--hard", type=int, default=6)
    parser.add_argument("-o", "--out", type=Path)
    return parser.parse_args()


def row(network: str, method: str, found, seconds: float) -> tuple[str, ...]:
    counts = [verdict.status for verdict in found]
    decided = sum(status in DECIDED for status in counts)
    figures = (decided, counts.count(Status.certified), counts.count(Status.falsified))
    return (network, method, f"{len(found)}", *map(str, figures), f"{seconds:.1f}", f"{seconds / len(found):.3f}")


def show(rows, stages, out: Path | None) -> None:
    table = Table(*HEADINGS)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    lines += ["", "What each stage of the cascade was asked and decided:", ""]
    lines += ["| Network | Stage | Asked | Decided | Seconds |", "| --- | --- | --- | --- | --- |"]
    for name, found in stages:
        lines += [f"| {name} | {one.stage} | {one.asked} | {one.decided} | {one.seconds:.2f} |" for one in found]
    if out:
        title = "# The cascade beside auto_LiRPA's alpha-CROWN"
        out.write_text(f"{title}\n\nMade by `python {' '.join(sys.argv)}`.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
