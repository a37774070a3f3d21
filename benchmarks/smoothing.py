"""Randomized smoothing: images per second against the plain loop, and samples needed against a fixed n.

    python benchmarks/smoothing.py [-o results/smoothing.md] [--log FILE@ALPHA]... [--threads 1] [--rounds 5]

Speed. The plain loop is procedure CERTIFY of Cohen et al. (2019) as it is commonly written: repeat the image, add
`randn_like * sigma`, take the arg max of the logits, count with numpy, in batches of 400 and of 1,000. Columns are
interleaved: every round runs each once, so that a busy machine slows all of them alike; ratios are taken within a
round. Weights and images are random, which changes nothing about the time.

Samples. Certified-accuracy curves of inputs sampled 100,000 times (Clopper-Pearson), and of the same inputs where
sampling stops early (betting). The inputs: a small network's on digits, really sampled; 6,000 whose radii are spread
as Cohen et al. publish them (CIFAR-10, sigma 0.25: certified at r = 0, .25, .5, .75, straight lines between); and, for
each `--log`, those of a published log (tab-separated: idx label predict radius correct time; made with n = 100,000 at
ALPHA), whose counts follow from its radii. Inputs of a log are few, so each stands for several with nearby
probabilities, and those that abstained have probabilities spread evenly from .35 to .5. Not part of the tests.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import ndtr, ndtri
from scipy.stats import beta
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers.errors import InputError  # noqa: E402
from certifiers.smoothing import SmoothedClassifier, Stopping, lower_sequence  # noqa: E402
from certifiers.smoothing.kinds import GAUSSIAN  # noqa: E402
from certifiers.smoothing.stopping import looks  # noqa: E402
from certprune.data import load_data  # noqa: E402
from certprune.models import build_model  # noqa: E402

SHAPE, CLASSES, SIGMA, N0, N, ALPHA = (1, 28, 28), 10, 0.25, 100, 100_000, 0.001
CASES = {"cnn_small": (16, 1900), "cnn_large": (16, 300)}  # model: images, samples of each
# In units of sigma: the tolerance, and how far the curve goes. Beyond 3.81 sigma n = 100,000 certifies nothing.
TOLERANCE, UP_TO, COPIES, SPREAD = 0.045, 3.0, 8, 0.25

TABLE = {0.0: 74.8, 0.25: 60.0, 0.5: 42.8, 0.75: 26.6}  # Cohen et al.: radius, certified %, sigma 0.25

Rows = list[dict[str, str]]


# ---- speed


def plain_loop(model: nn.Module, x: Tensor, n: int, batch_size: int) -> NDArray[np.int64]:
    """The counts of `n` noisy copies of each image."""
    found = np.zeros((len(x), CLASSES), dtype=np.int64)
    with torch.no_grad():
        for row, image in enumerate(x):
            left = n
            while left > 0:
                size = min(batch_size, left)
                left -= size
                batch = image.repeat((size, 1, 1, 1))
                noise = torch.randn_like(batch) * SIGMA
                predictions = model(batch + noise).argmax(1)
                for index in predictions.cpu().numpy():
                    found[row, index] += 1
    return found


def plain_certify(model: nn.Module, x: Tensor, n: int, batch_size: int) -> None:
    """What the loop costs for the samples that select the class, and those that estimate its probability."""
    plain_loop(model, x, N0, batch_size)
    plain_loop(model, x, n, batch_size)


def speed(console: Console, rounds: int) -> Rows:
    rows: Rows = []
    for name, (images, n) in CASES.items():
        torch.manual_seed(0)
        model, x = build_model(name, SHAPE, CLASSES).eval(), torch.rand(images, *SHAPE)
        own = SmoothedClassifier(model, CLASSES, SIGMA)
        shared = SmoothedClassifier(model, CLASSES, SIGMA, shared_noise=True)
        batch = own.batch_size(x, N)
        columns: dict[str, Callable[[], object]] = {
            "plain loop, batches of 400": lambda m=model, x=x, n=n: plain_certify(m, x, n, 400),
            "plain loop, batches of 1,000": lambda m=model, x=x, n=n: plain_certify(m, x, n, 1000),
            f"ours, batches of {batch:,} (found)": lambda c=own, x=x, n=n, b=batch: c.certify(x, N0, n, batch_size=b),
            f"ours, shared noise, batches of {batch:,}": lambda c=shared, x=x, n=n, b=batch: c.certify(
                x, N0, n, batch_size=b
            ),
        }
        seconds = {column: [] for column in columns}
        for number in range(rounds + 1):
            for column, run in columns.items():
                begin = time.perf_counter()
                run()
                if number:  # the first round warms up
                    seconds[column].append(time.perf_counter() - begin)
        plain = list(seconds.values())[:2]
        for column, took in seconds.items():
            ratios = [[b / own for b, own in zip(base, took, strict=True)] for base in plain]
            samples = images * (n + N0)
            rows.append(
                {
                    "Network": f"{name}, {images} images",
                    "Loop": column,
                    "us a sample": f"{1e6 * statistics.median(took) / samples:.1f}",
                    "Images/s at n = 100,000": f"{samples / statistics.median(took) / N:.3f}",
                    "x plain, 400": f"{statistics.median(ratios[0]):.2f}",
                    "x plain, 1,000": f"{statistics.median(ratios[1]):.2f}",
                }
            )
    return show(console, "Speed", rows)


# ---- samples


def radii_of(bounds: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return sigma * np.maximum(ndtri(np.maximum(bounds, 0.5)), 0.0)


def fixed_radii(counts: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    return radii_of(np.where(counts > 0, beta.ppf(ALPHA, np.maximum(counts, 1), N - counts + 1), 0.0), sigma)


def compare(
    fixed: NDArray[np.float64], early: NDArray[np.float64], right: NDArray[np.bool_], samples: float, sigma: float
) -> dict[str, str]:
    """How much lower the curve is anywhere up to UP_TO sigma, at steps of 0.01 sigma; radius 0 asks for any radius."""
    grid = sigma * np.arange(0.0, UP_TO + 1e-9, 0.01)

    def curve(radii: NDArray[np.float64]) -> NDArray[np.float64]:
        held = (radii[:, None] >= np.maximum(grid, 1e-12)) & right[:, None]
        return 100 * held.mean(0)

    one, other = curve(fixed), curve(early)
    loss = one - other
    table = [round(100 * step) for step in (0, 1, 2, 3)]
    return {
        "Samples an image": f"{samples:,.0f}",
        "x fewer than 100,000": f"{N / samples:.1f}",
        "Lower by at most": f"{loss.max():.2f} points at r = {grid[loss.argmax()]:.2f}",
        "Lower on average": f"{loss.mean():.2f}",
        "Certified % at r = 0, 1, 2, 3 sigma": ", ".join(f"{other[place]:.1f}" for place in table),
        "of a fixed n": ", ".join(f"{one[place]:.1f}" for place in table),
    }


def rules(sigma: float) -> dict[str, Stopping]:
    return {
        f"tolerance {TOLERANCE:g} sigma, up to {UP_TO:g} sigma": Stopping(TOLERANCE * sigma, UP_TO * sigma),
        f"decide r = {2 * sigma:g}": Stopping(radii=(2 * sigma,)),
    }


def table_inputs(inputs: int = 6000) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probabilities, and which inputs are right, of radii spread as in TABLE; the rest are wrong, or abstained."""
    share = (np.arange(inputs) + 0.5) / inputs
    least = 1.0 - np.array(list(TABLE.values())) / 100
    p = ndtr(np.interp(share, least, list(TABLE)) / SIGMA)
    right = share > least[0]
    p[~right] = np.linspace(0.3, 0.9, (~right).sum())
    p[share > least[-1]] = 1.0
    return p, right


def published(path: str) -> Rows:
    """The inputs of a log, simulated: each count at 100,000 samples, and at each look before that."""
    name, _, level = path.rpartition("@")
    sigma = float(name.rpartition("_")[2])
    log = np.loadtxt(name, skiprows=1, usecols=(2, 3, 4))
    counts = np.arange(N // 2, N + 1)
    bounds = beta.ppf(float(level), counts, N - counts + 1)
    p = np.interp(ndtr(log[:, 1] / sigma), bounds, counts / N)
    p[log[:, 0] < 0] = np.linspace(0.35, 0.5, int((log[:, 0] < 0).sum()))
    rng = np.random.default_rng(0)
    saturated = np.repeat(p > 1 - 0.5 / N, COPIES)
    p = ndtr(np.repeat(ndtri(np.minimum(p, 1 - 1e-9)), COPIES) + SPREAD * rng.standard_normal(COPIES * len(p)))
    p[saturated] = 1.0
    right = np.repeat(log[:, 2] == 1, COPIES)
    return simulated(f"published log, sigma {sigma:g}: {len(log)} x {COPIES}", p, right, sigma)


def simulated(name: str, p: NDArray[np.float64], right: NDArray[np.bool_], sigma: float) -> Rows:
    """Inputs of known probabilities: the same samples, all 100,000 and up to where each rule stops."""
    rng = np.random.default_rng(1)
    asked = np.array(looks(N))
    seen = rng.binomial(np.diff(asked, prepend=0), p[:, None]).cumsum(1)
    fixed = fixed_radii(seen[:, -1], sigma)
    rows = []
    for rule, stopping in rules(sigma).items():
        at = stopping.enough(seen, asked, N, ALPHA, GAUSSIAN, sigma).argmax(1)
        won = seen[np.arange(len(p)), at]
        early = radii_of(lower_sequence(won, asked[at], ALPHA), sigma)
        what = {"Inputs": name, "Rule": rule}
        rows.append(
            what | only_radius(stopping, compare(fixed, early, right, asked[at].mean(), sigma), fixed, early, right)
        )
    return rows


def only_radius(
    stopping: Stopping,
    row: dict[str, str],
    fixed: NDArray[np.float64],
    early: NDArray[np.float64],
    right: NDArray[np.bool_],
) -> dict[str, str]:
    """Where a rule decides one radius, the loss that counts is the one there."""
    if not stopping.radii:
        return row
    (radius,) = stopping.radii
    loss = 100 * (((fixed >= radius) & right).mean() - ((early >= radius) & right).mean())
    return row | {"Lower by at most": f"{loss:.2f} points at r = {radius:g}", "Lower on average": ""}


def sampled(images: int) -> Rows:
    """A network of two layers trained under noise on digits; every image really sampled, twice."""
    data = load_data("digits", seed=0, validation=0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(600):
        rows = torch.randint(len(data.train.y), (128,))
        loss = nn.functional.cross_entropy(
            model(data.train.x[rows] + SIGMA * torch.randn(128, *data.shape)), data.train.y[rows]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = data.test.x[:images], data.test.y[:images].numpy()
    classifier = SmoothedClassifier(model.eval(), data.classes, SIGMA)

    def outcome(stopping: Stopping | None) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
        found = classifier.certify(x, N0, N, ALPHA, stopping=stopping)
        right = np.array([c.prediction for c in found], dtype=object) == y
        return np.array([c.radius for c in found]), right, float(np.mean([c.samples for c in found]))

    fixed, right, _ = outcome(None)
    rows = []
    for rule, stopping in rules(SIGMA).items():
        early, also_right, samples = outcome(stopping)
        fixed, early = np.where(right, fixed, 0.0), np.where(also_right, early, 0.0)
        every = np.ones(len(y), dtype=bool)
        row = only_radius(stopping, compare(fixed, early, every, samples, SIGMA), fixed, early, every)
        rows.append({"Inputs": f"digits, sigma {SIGMA:g}: {images} images, sampled", "Rule": rule} | row)
    return rows


# ---- both


def show(console: Console, title: str, rows: Rows) -> Rows:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    return rows


def markdown(rows: Rows) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=200, help="digits that are really sampled")
    parser.add_argument("--log", action="append", default=[], metavar="FILE@ALPHA", help="named ..._SIGMA")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the figures there as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    needed = sampled(arguments.images)
    needed += simulated("published table, sigma 0.25: 6,000", *table_inputs(), SIGMA)
    for path in arguments.log:
        needed += published(path)
    show(console, "Samples", needed)
    fast = speed(console, arguments.rounds)
    if arguments.out:
        about = (
            f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), medians of "
            f"{arguments.rounds} interleaved rounds in one process."
        )
        arguments.out.write_text(
            PAGE.format(rounds=arguments.rounds, about=about, samples=markdown(needed), speed=markdown(fast))
        )
        console.print(f"Written to {arguments.out}")


PAGE = """# Randomized smoothing: samples needed, and speed

Made by `python benchmarks/smoothing.py --rounds {rounds} -o results/smoothing.md --log DIR/sigma_0.25@0.01
--log DIR/sigma_0.50@0.01 --log DIR/sigma_0.12@0.001`, where the logs are those that Cohen et al. publish with
their code (CIFAR-10, ResNet-110, each network certified at the sigma it was trained with);
without `--log` it makes the other rows. {about}

## Samples for a whole curve

Certified accuracy with alpha 0.001 of the same inputs, sampled 100,000 times (Clopper-Pearson) and stopped early
(betting, at most 100,000 samples). "Lower by at most": over all radii from 0 to 3 sigma in steps of 0.01 sigma. Beyond
that the curve falls steeply to its end at 3.81 sigma, where an input must show no failure in 100,000 samples: there
nothing can be saved.

{samples}

How much is saved depends on how densely radii lie: a tolerance of t lowers the curve by at most about t times the
share of images in a unit of radius. On the published table 5 times fewer samples cost less than one point; the logs
have clumps of radii (an image is 0.2 points) and come near one point; the digits' radii lie
twice as densely (an image is 0.5 points), and there a whole curve to within one point needs more
samples than a fifth. Where only one radius is to be
decided, all need far fewer: such a row is right at its radius, and not meant for others.

## Speed

The plain loop repeats the image, adds `randn_like * sigma`, takes the arg max and counts with numpy. Ours fills one
buffer with noise in place; with shared noise, it and the first layer are computed once for all images of a group.

{speed}
"""


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
