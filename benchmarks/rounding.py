"""What it costs that bounds hold in exact arithmetic: time, tightness, certificates.

    python benchmarks/rounding.py RUN [--variant NAME ...] [--count 100] [--rounds 7] [-o results/rounding.md]

Each method with and without the account of rounding, interleaved in one process; ratios of processor time are the
medians over the rounds. "Taken off": by how much the margins are lower, in units of the logits.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers import margin_lower_bounds  # noqa: E402
from certifiers.threat import threat  # noqa: E402
from certprune.data import load_data  # noqa: E402
from certprune.runs import open_run  # noqa: E402

HEADINGS = ("network", "method", "ms an image", "ratio", "taken off, mean", "largest", "certified", "without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = open_run(asked.run)
    recipe = run.recipe
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    x, y, ball = data.test.x[: asked.count], data.test.y[: asked.count], threat(recipe.norm, recipe.eps_grid[0])
    rows = [
        (name, method, *row(run.load_model(name), x, y, ball, method, asked.rounds))
        for name in asked.variant or [variant.name for variant in recipe.variants]
        for method in ("ibp", "crown-ibp", "crown")
    ]
    lines = [
        "# Bounds that hold in exact arithmetic: what they cost",
        "",
        f"Made by `python benchmarks/rounding.py`: {recipe.data.name}, `{recipe.model.name}`, {recipe.norm} eps "
        f"{ball.eps:g}, {asked.count} images, float32, 1 thread, torch {torch.__version__}, {platform.machine()}. "
        f"Ratio: processor time with the account of rounding over that without, median of {asked.rounds} interleaved "
        "rounds. "
        "Taken off: by how much it lowers a margin.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)),
    ]
    print("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def row(model, x, y, ball, method: str, rounds: int) -> tuple[str, ...]:
    spent: dict[bool, list[float]] = {False: [], True: []}
    bounds = {}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for account in (False, True):
            begin = time.process_time()
            bounds[account] = margin_lower_bounds(model, x, y, ball, method, account_for_rounding=account)
            spent[account].append(time.process_time() - begin)
    ratio = statistics.median(ours / plain for ours, plain in zip(spent[True][1:], spent[False][1:], strict=True))
    each = 1e3 * statistics.median(spent[True][1:]) / len(x)
    others = torch.ones_like(bounds[True], dtype=torch.bool).scatter(1, y[:, None], False)
    loss = (bounds[False] - bounds[True])[others]
    counts = [int(((found > 0) | ~others).all(1).sum()) for found in (bounds[True], bounds[False])]
    return (method, f"{each:.2f}", f"{ratio:.2f} x", f"{loss.mean():.1e}", f"{loss.max():.1e}", *map(str, counts))[1:]


if __name__ == "__main__":
    main()
