"""`certprune verify` on public instances of the verification competition of 2021, against the published verdicts.

    python benchmarks/vnncomp.py CHECKOUT RESULTS [--benchmark mnistfc] [--count N] [--timeout S] [-o PAGE.md]

CHECKOUT is a copy of stanleybak/vnncomp2021 (networks and properties), RESULTS one of stanleybak/vnncomp2021_results.
The published verdict of an instance is that of most tools that decided it; where there is no most, it is left out. A
verdict here that differs from it is counted as wrong, and makes the script end with 1. With --count, that many
instances are taken, evenly over each benchmark's list; --timeout caps the benchmark's own limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers.errors import InputError  # noqa: E402
from certifiers.vnncomp import read_network, read_property, verify  # noqa: E402

MEANINGS = {"unsat": "unsat", "holds": "unsat", "sat": "sat", "violated": "sat"}
HEADINGS = (
    "Benchmark",
    "Instances",
    "Decided",
    "unsat",
    "sat",
    "Unknown",
    "Time out",
    "Wrong",
    "Decided by someone in 2021",
    "Seconds in all",
)


def published(results: Path) -> dict[tuple[str, str, str], Counter]:
    """How many tools of 2021 said what of (benchmark, network's file name, property's folder and file name)."""
    found = defaultdict(Counter)
    for path in sorted(results.glob("results_csv/*.csv")):
        for row in csv.reader(path.read_text().splitlines()):
            verdict = MEANINGS.get(row[4].strip().lower()) if len(row) > 4 else None
            if verdict:
                found[row[0], Path(row[1]).name, _property(row[2])][verdict] += 1
    return found


def _property(path: str) -> str:
    """A property's folder and name: cifar10_resnet has files of one name in two folders."""
    return "/".join(Path(path).parts[-2:])


def instances(folder: Path, count: int | None) -> list[tuple[Path, Path, float]]:
    lines = list(csv.reader((folder / f"{folder.name}_instances.csv").read_text().splitlines()))
    if count is not None and count < len(lines):
        lines = [lines[i * len(lines) // count] for i in range(count)]
    return [(folder / onnx, folder / vnnlib, float(seconds)) for onnx, vnnlib, seconds in lines]


def run(folder: Path, known: dict, count: int | None, cap: float | None) -> Counter:
    """Verify the instances of one benchmark, a line on the screen for each."""
    tally = Counter()
    for onnx, vnnlib, limit in instances(folder, count):
        said = known.get((folder.name, onnx.name, _property(str(vnnlib))), Counter())
        truth = None if said["sat"] == said["unsat"] else max(said, key=said.get)
        begin = time.monotonic()
        try:
            answer = verify(read_network(onnx), read_property(vnnlib), min(limit, cap or limit))
            verdict, method = answer.verdict, answer.method
        except InputError as error:
            verdict, method = "unknown", str(error)[:80]
        seconds = time.monotonic() - begin
        wrong = verdict in ("sat", "unsat") and truth is not None and verdict != truth
        tally.update({"instances": 1, verdict: 1, "wrong": wrong, "published": truth is not None, "seconds": seconds})
        others = ", ".join(f"{count} {word}" for word, count in said.most_common()) or "-"
        line = f"{onnx.name} {vnnlib.name}: {verdict} ({method}), {seconds:.1f} s; 2021: {others}"
        print(line + (" WRONG" if wrong else ""), flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--benchmark", action="append", help="default: mnistfc and cifar10_resnet")
    parser.add_argument("--count", type=int)
    parser.add_argument("--timeout", type=float)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    known = published(options.results)
    rows, wrong = [], 0
    for name in options.benchmark or ("mnistfc", "cifar10_resnet"):
        t = run(options.checkout / "benchmarks" / name, known, options.count, options.timeout)
        wrong += t["wrong"]
        figures = (t["instances"], t["sat"] + t["unsat"], t["unsat"], t["sat"], t["unknown"], t["timeout"], t["wrong"])
        rows.append((name, *figures, t["published"], f"{t['seconds']:.0f}"))
    lines = [" | ".join(map(str, row)) for row in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    page = "\n".join(f"| {line} |" for line in lines) + "\n"
    print(f"\n{page}")
    if options.out:
        options.out.write_text(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
