"""The most memory that a recipe's training takes, at its own width and batch, dense and with scores.

    python benchmarks/memory.py [RECIPE ...] [--batch N] [--threads 2] [--device cpu] [-o results/memory.md]

Without RECIPE: those of the paper's scale (SVHN's differ from CIFAR-10's in the images alone). Each runs in a process
of its own, which takes two steps of pretraining and two of score pruning on noise and tells its highest resident memory
(on a GPU: torch's highest allocation). Attacks take two steps, since further ones reuse their memory. Not part of the
tests.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from certprune.config import Recipe  # noqa: E402
from certprune.data import Data, Split  # noqa: E402
from certprune.data.images import ByteImages  # noqa: E402
from certprune.provenance import hardware  # noqa: E402
from certprune.recipes import load_recipe  # noqa: E402
from certprune.runs import start_run  # noqa: E402
from certprune.stages import run_stages  # noqa: E402
from certprune.storage import write_text  # noqa: E402

FOLDERS = ("cifar10", "mnist_full", "imagenet")
SHAPES = {"cifar10": (3, 32, 32), "svhn": (3, 32, 32), "mnist": (1, 28, 28), "imagenet": (3, 224, 224)}
CPU_BATCH = {"imagenet": 32}  # 256 such images take more than most machines have
FEWEST = {"trades": {"steps": 2}, "sabr": {"steps": 2}, "free": {"replays": 2}, "mixtrain": {"probability": 1.0}}
HEADINGS = ("Recipe", "Network", "Objective", "Batch", "Pretraining, GB", "and score pruning, GB")


def noise(name: str, count: int, classes: int = 10) -> Data:
    """Noise of the shape of that set's images, with every class of a few."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        pixels = torch.randint(256, (n, *SHAPES[name]), generator=generator, dtype=torch.uint8)
        return Split(ByteImages(pixels), torch.arange(n) % classes)

    return Data(name, classes, SHAPES[name], split(count), split(4), split(2), augment=("flip",))


def batch_of(recipe: Recipe, device: str) -> int:
    most = CPU_BATCH.get(recipe.data.name) if device == "cpu" else None
    return min(recipe.prune.batch_size, most or recipe.prune.batch_size)


def train(path: Path, batch: int, device: str, threads: int) -> dict[str, float]:
    """Gigabytes after each stage; this process's peak never falls, so the second is that of both on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"output={folder}/run", f"device={device}", f"threads={threads}"]
        words += [f"{s}.{key}" for s in ("pretrain", "prune") for key in ("epochs=1", f"batch_size={batch}")]
        objective = load_recipe(path).objective["name"]
        words += [f"objective.{key}={value}" for key, value in FEWEST.get(objective, {}).items()]
        recipe = load_recipe(path, words)
        scores = next(v for v in recipe.variants if not v.dense and v.criterion == "score")
        run = start_run(recipe.model_copy(update={"variants": (scores,)}), "memory", threads, device)
        data, peaks = noise(recipe.data.name, 2 * batch), {}
        for stage in ("pretrain", "prune"):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run_stages(run, data, torch.device(device), [stage])
            peaks[stage] = peak(device)
    return peaks


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measured(path: Path, batch: int, device: str, threads: int) -> dict[str, float]:
    """As :func:`train`, in a process of its own."""
    words = [str(path), "--inside", "--batch", str(batch), "--device", device, "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise SystemExit(f"{path}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def name_of(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def markdown(rows: list[tuple[str, ...]], device: str, threads: int) -> str:
    machine = hardware(device)
    what = "torch's highest allocation" if device == "cuda" else "highest resident memory of the process"
    where = machine.get("gpu") or f"{threads} thread{'s' * (threads > 1)} of {machine['processor']}"
    lines = [
        "# Memory of training",
        "",
        f"Made by `python {' '.join(sys.argv)}`: {what} over two steps of each stage on noise, networks of full width, "
        f"float32; torch {torch.__version__}, Python {platform.python_version()}, {where}. `batch_size`, `model.width` "
        "and `speed.accumulate` lower it.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        *[f"| {' | '.join(row)} |" for row in rows],
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="recipes (default: the paper's scale)")
    parser.add_argument("--batch", type=int, help="images in a batch (default: the recipe's; 32 of ImageNet on a CPU)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the figures there too, as Markdown")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(train(arguments.recipes[0], arguments.batch, arguments.device, arguments.threads)))
        return
    console, rows = Console(), []
    paths = arguments.recipes or [p for f in FOLDERS for p in sorted((ROOT / "configs" / f).glob("*.yaml"))]
    for path in paths:
        recipe = load_recipe(path)
        batch = arguments.batch or batch_of(recipe, arguments.device)
        with console.status(f"{name_of(path)}, {len(rows) + 1} of {len(paths)}"):
            peaks = measured(path, batch, arguments.device, arguments.threads)
        figures = (f"{peaks['pretrain']:.2f}", f"{peaks['prune']:.2f}")
        rows.append((name_of(path), recipe.model.name, recipe.objective["name"], f"{batch}", *figures))
        if arguments.out:  # as it goes: the wide ones take minutes
            write_text(arguments.out, markdown(rows, arguments.device, arguments.threads))
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if arguments.out:
        console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
