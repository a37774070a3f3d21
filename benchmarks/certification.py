"""What each method proves and what it takes: one after the other, the whole cascade, and the inputs hardest to decide.

    python benchmarks/certification.py RUN --variant dense --variant score-erk-0.99 -o results/certification.md
        [--count 500] [--hard 20] [--search 2000] [--seconds 60] [--external "COMMAND {onnx} {vnnlib} {timeout}"]

Hard are inputs that neither CROWN proves nor a strong attack (10 restarts of 50 steps) breaks, the first ``--hard`` of
the first ``--search``; they are given to the complete search, and to another verifier, for ``--seconds`` each.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers import certify, margin_lower_bounds  # noqa: E402
from certifiers.attack import attack  # noqa: E402
from certifiers.methods import CASCADE  # noqa: E402
from certifiers.stages import DECIDED, summarise_stages  # noqa: E402
from certifiers.threat import threat  # noqa: E402
from certifiers.verdict import Status  # noqa: E402
from certifiers.vnncomp import run_external, write_instances  # noqa: E402
from certprune.data import load_data  # noqa: E402
from certprune.runs import open_run  # noqa: E402

console = Console(stderr=True)


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    parts = {"alone": [], "stages": [], "hard": []}
    for path in [asked.run, *asked.harder]:
        run = open_run(path)
        recipe = run.recipe
        data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
        subject = Subject(threat(recipe.norm, asked.eps or recipe.eps_grid[0]), data.test, asked)
        for variant in asked.variant or [variant.name for variant in recipe.variants]:
            if recipe.variant(variant) is None:
                continue
            name, model = f"{recipe.objective['name']}: {variant}", run.load_model(variant)
            if path == asked.run:
                parts["alone"] += [(name, *cells) for cells in subject.alone(model)]
                parts["stages"] += [(name, *cells) for cells in subject.whole(model)]
            for cells in subject.hard(model):
                parts["hard"].append((name, *cells))
                write(asked, recipe, subject.ball.eps, parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--harder", type=Path, action="append", default=[], help="a run, for its hardest inputs alone")
    parser.add_argument("--variant", action="append")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--search", type=int, default=2000)
    parser.add_argument("--hard", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--external", help="another verifier's command, as certify --external takes it; it is killed at twice --seconds"
    )
    parser.add_argument("--external-name", default="the other verifier")
    parser.add_argument("--external-hard", type=int, default=3, help="it is asked about so many of the hardest inputs")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


class Subject:
    """The images of one run, and what is asked about them."""

    def __init__(self, ball, split, asked: argparse.Namespace) -> None:
        self.ball, self.split, self.asked = ball, split, asked

    def timed(self, model, numbers, methods, **settings):
        x, y = self.split.x[numbers], self.split.y[numbers]
        certify(model, x[:1], y[:1], self.ball, "ibp", attack_steps=0)  # traced and warm
        begin = time.perf_counter()
        found = certify(model, x, y, self.ball, methods, indices=numbers, **settings)
        return found, time.perf_counter() - begin

    def alone(self, model):
        """Each method by itself, without an attack: what it certifies of the first images, and its time."""
        numbers = list(range(self.asked.count))
        for method in CASCADE:
            console.print(f"{method} alone")
            found, seconds = self.timed(model, numbers, method, attack_steps=0)
            certified = sum(v.status is Status.certified for v in found)
            yield method, str(len(found)), str(certified), f"{seconds:.1f}"
        found, seconds = self.timed(model, numbers, "cascade", attack_steps=40, attack_restarts=2)
        certified = sum(v.status is Status.certified for v in found)
        yield "cascade, with its attack", str(len(found)), str(certified), f"{seconds:.1f}"

    def whole(self, model):
        """The cascade to its end, the complete search: a row for each stage."""
        console.print("the cascade to its end")
        numbers, methods = list(range(self.asked.count)), (*CASCADE, "exact")
        found, seconds = self.timed(model, numbers, methods, input_seconds=self.asked.seconds)
        for one in summarise_stages(found, methods):
            counts = (one.asked, one.misclassified, one.falsified, one.certified)
            yield one.stage, *map(str, counts), f"{one.seconds:.1f}"
        by = [v.status for v in found]
        counts = [by.count(s) for s in (Status.misclassified, Status.falsified, Status.certified)]
        left = len(found) - sum(counts)
        yield f"**all** ({left} open)", str(len(found)), *map(str, counts), f"{seconds:.1f}"

    def hard(self, model):
        """The inputs that CROWN's bounds and a strong attack leave open."""
        console.print("looking for hard inputs")
        hard = self._open(model)[: self.asked.hard]
        found, spent_on = [], []
        for number in hard:
            (verdict,), spent = self.timed(
                model, [number], (*CASCADE[1:], "exact"), attack_steps=0, input_seconds=self.asked.seconds
            )
            console.print(f"certprune {number}: {verdict.status.value} by {verdict.method} in {spent:.1f} s")
            found.append(verdict.status)
            spent_on.append(spent)
        yield self._row("certprune", found, sum(spent_on))
        if self.asked.external and len(hard) > self.asked.external_hard:  # the same inputs as the other's
            some = self.asked.external_hard
            yield self._row(f"certprune, the first {some}", found[:some], sum(spent_on[:some]))
        if self.asked.external and hard:
            found, seconds = self._external(model, hard[: self.asked.external_hard])
            yield self._row(self.asked.external_name, found, seconds)

    def _open(self, model) -> list[int]:
        """Predicted right, not proven by CROWN, not broken by 10 restarts of 50 steps."""
        x, y = self.split.x[: self.asked.search], self.split.y[: self.asked.search]
        open_ = []
        for rows in torch.arange(len(x)).split(100):
            with torch.no_grad():
                rows = rows[model(x[rows]).argmax(1) == y[rows]]
                for method in ("ibp", "crown"):  # what intervals prove CROWN need not
                    bounds = margin_lower_bounds(model, x[rows], y[rows], self.ball, method)
                    rows = rows[((bounds <= 0).scatter(1, y[rows, None], False)).any(1)]
            _, broken = attack(model, x[rows], y[rows], self.ball, steps=50, restarts=10)
            open_ += rows[~broken].tolist()
        return open_

    def _row(self, tool: str, found: list[Status], seconds: float):
        decided = sum(status in DECIDED for status in found)
        counts = [found.count(status) for status in (Status.certified, Status.falsified)]
        each = f"{seconds / max(len(found), 1):.1f}"
        return tool, str(len(found)), str(decided), *map(str, counts), each

    def _external(self, model, hard):
        found, seconds = [], 0.0
        for number in hard:
            with tempfile.TemporaryDirectory() as folder:
                x, y = self.split.x[[number]], self.split.y[[number]]
                ((onnx, prop, _),) = write_instances(model, x, y, self.ball, folder, indices=[number])
                answer = run_external(
                    self.asked.external, Path(folder) / onnx, Path(folder) / prop, 2 * self.asked.seconds, x[0].numel()
                )
            console.print(f"external {number}: {answer.verdict} in {answer.seconds:.1f} s {answer.note}")
            status = {"unsat": Status.certified, "sat": Status.falsified}.get(answer.verdict, Status.unknown)
            found.append(status)
            seconds += answer.seconds
        return found, seconds


def write(asked, recipe, eps: float, parts) -> None:
    lines = [
        "# Certification: what each method decides, and what it takes",
        "",
        f"Made by `python benchmarks/certification.py`: {recipe.data.name}, `{recipe.model.name}`, {recipe.norm} eps "
        f"{eps:g}, seed {recipe.seed}, the first {asked.count} test images, {asked.threads} thread(s), torch "
        f"{torch.__version__}, {platform.machine()}.",
        "",
        "## Each method alone",
        "",
        *table(("network", "method", "images", "certified", "seconds"), parts["alone"]),
        "",
        "## The cascade to its end",
        "",
        f"At most {asked.seconds:g} s an image. Only what a stage leaves undecided moves on.",
        "",
        *table(("network", "stage", "asked", "misclassified", "falsified", "certified", "seconds"), parts["stages"]),
        "",
        "## The hardest inputs",
        "",
        f"Of the first {asked.search} test images those that CROWN does not prove and 10 restarts of a 50-step attack "
        f"do not break, the first {asked.hard} at most; {asked.seconds:g} s for each, one after the other. Another "
        "verifier is asked as by `certify --external`, with its default settings; its time holds its start, and it is "
        "killed at twice the limit.",
        "",
        *table(
            ("network", "verifier", "inputs", "decided", "certified", "falsified", "seconds an input"), parts["hard"]
        ),
    ]
    asked.out.write_text("\n".join(lines) + "\n")


def table(headings, rows) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]


if __name__ == "__main__":
    main()
