"""Dense, masked and compacted networks: size, multiply-adds, latency in torch and onnxruntime, certification time.

    python benchmarks/compaction.py RUN [--variant NAME ...] [--prune 0.995] [--count 200] [-o results/compaction.md]

One thread; processor time is measured: without other work on the machine that is the time that passes, and
with it, it is hardly more. All networks of a batch size are timed in turn, round by round, and the fastest of a
network's rounds counts, which other work disturbed least. ``--prune`` adds networks that are cut from the
pretrained one by magnitude and not finetuned: what they compute is worth nothing, but they cost what finetuned ones do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from certifiers import certify  # noqa: E402
from certifiers.methods import CASCADE  # noqa: E402
from certifiers.threat import threat  # noqa: E402
from certifiers.verdict import Status, Verdict  # noqa: E402
from certprune.compact import Cost, compact, cost_of  # noqa: E402
from certprune.data import load_data  # noqa: E402
from certprune.masks import materialize, sparsify  # noqa: E402
from certprune.runs import Run, open_run  # noqa: E402
from certprune.storage import write_text  # noqa: E402

BATCHES = (1, 256)
POINTS = 10_000
ENGINES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Net:
    """One network to measure; ``trained`` says whether its predictions mean anything."""

    name: str
    kind: str  # dense, masked or compacted
    model: nn.Module
    trained: bool = True

    @property
    def title(self) -> str:
        return f"{self.name}, {self.kind}"


def networks(run: Run, variants: Sequence[str], pruned: Sequence[float], shape: tuple[int, ...]) -> list[Net]:
    """The dense network, and each of the others masked and compacted."""
    first = "dense" if run.recipe.variant("dense") is not None else "pretrain"
    dense = run.load_model(first)
    found = [Net(first, "dense", dense), Net(first, "compacted", compact(dense, shape).model)]
    nets = [(name, run.load_model(name), True) for name in variants]
    for sparsity in pruned:
        cut = sparsify(run.load_model("pretrain"), sparsity=sparsity, criterion="magnitude", budget="erk")
        nets.append((f"magnitude-erk-{sparsity:g}, not finetuned", materialize(cut).eval(), False))
    for name, model, trained in nets:
        found += [
            Net(name, "masked", model, trained),
            Net(name, "compacted", compact(model, shape).model, trained),
        ]
    return found


def in_onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], object]:
    """The network of any batch size in onnxruntime, on one thread."""
    import onnxruntime

    path = folder / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"X": {0: "batch"}, "Y": {0: "batch"}}
        names = {"input_names": ["X"], "output_names": ["Y"], "dynamic_axes": axes}
        torch.onnx.export(model, (x[:2],), str(path), dynamo=False, opset_version=13, **names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"X": batch.numpy()})


@torch.no_grad()
def latencies(nets: Sequence[Net], x: Tensor, rounds: int) -> dict[tuple[str, str, int], list[float]]:
    """Seconds of every round, by title, engine and batch size."""
    found: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {(net.title, "torch"): net.model for net in nets}
        runs |= {(net.title, "onnxruntime"): in_onnxruntime(net.model, x, Path(folder)) for net in nets}
        for batch in BATCHES:
            part, repeats = x[:batch], max(1, 32 // batch)
            for number in range(rounds + 2):
                for (title, engine), call in runs.items():
                    begin = time.process_time()
                    for _ in range(repeats):
                        call(part)
                    if number >= 2:  # the first two are warm-up
                        seconds = (time.process_time() - begin) / repeats
                        found.setdefault((title, engine, batch), []).append(seconds)
    return found


@torch.no_grad()
def largest_gap(masked: nn.Module, compacted: nn.Module, shape: tuple[int, ...]) -> float:
    """Of the logits on random inputs and corners of the whole domain, relative to the largest logit."""
    x = torch.rand(POINTS, *shape, generator=torch.Generator().manual_seed(1))
    x[::2] = x[::2].round()
    a, b = (torch.cat([model(part) for part in x.split(500)]) for model in (masked, compacted))
    return float((a - b).abs().amax() / a.abs().amax().clamp(min=1))


def certified_alike(found: list[Verdict], others: list[Verdict]) -> int:
    """For how many inputs both say the same of whether it is certified."""
    return sum(
        (a.status is Status.certified) == (b.status is Status.certified) for a, b in zip(found, others, strict=True)
    )


def certification(run: Run, nets: Sequence[Net], count: int) -> list[list[str]]:
    """Rows of the table of certification times: masked beside compacted, the same images and settings."""
    recipe = run.recipe
    data = load_data(recipe.data.name, seed=recipe.seed, validation=recipe.data.validation, **recipe.data.options)
    x, y, ball = data.test.x[:count], data.test.y[:count], threat(recipe.norm, recipe.main_eps)
    rows = []
    for masked, compacted in zip(nets[::2], nets[1::2], strict=True):
        if not masked.trained:
            continue
        for name, methods in (("crown", ("crown",)), ("cascade", CASCADE)):
            timed = []
            for net in (masked, compacted):
                certify(net.model, x[:1], y[:1], ball, "ibp")  # traced and warm
                begin = time.process_time()
                verdicts = certify(net.model, x, y, ball, methods, attack_steps=0)
                timed.append((verdicts, time.process_time() - begin))
            (was, before), (now, after) = timed
            certified = [sum(v.status is Status.certified for v in verdicts) for verdicts in (was, now)]
            rows.append([masked.name, name, f"{before:.2f}", f"{after:.2f}", f"{before / after:.1f} x",
                         str(certified[0]), str(certified[1]), str(certified_alike(was, now))])  # fmt: skip
    return rows


def size_rows(nets: Sequence[Net], costs: dict[str, Cost], gaps: dict[str, float]) -> list[list[str]]:
    dense = costs[nets[0].title].multiply_adds
    rows = []
    for net in nets:
        cost = costs[net.title]
        gap = f"{gaps[net.title]:.0e}" if net.title in gaps else ""
        rows.append([net.name, net.kind, f"{cost.parameters:,}", f"{cost.nonzero:,}", f"{cost.file_bytes:,}",
                     f"{cost.compressed_bytes:,}", f"{cost.multiply_adds:,}", f"{dense / cost.multiply_adds:.1f} x",
                     f"{cost.nonzero_multiply_adds:,}", gap])  # fmt: skip
    return rows


def latency_rows(nets: Sequence[Net], times: dict[tuple[str, str, int], list[float]]) -> list[list[str]]:
    rows = []
    for net in nets:
        row = [net.name, net.kind]
        for engine in ENGINES:
            for batch in BATCHES:
                mine, dense = min(times[net.title, engine, batch]), min(times[nets[0].title, engine, batch])
                row.append(f"{1000 * mine:.3f} ({dense / mine:.1f} x)")
        rows.append(row)
    return rows


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(nets: Sequence[Net], sizes: list[list[str]], speeds: list[list[str]], proofs: list[list[str]], asked) -> str:
    load = os.getloadavg()[0]
    busy = (
        f" Other work was running meanwhile (load average {load:.1f} on {os.cpu_count()} cores)." if load > 1.3 else ""
    )
    by_engine = [f"{engine}, batch {batch}" for engine in ENGINES for batch in BATCHES]
    return f"""# Compacted networks: size, speed, certification

Made by `python {" ".join(sys.argv)}`:
torch {torch.__version__}, one thread.{busy} Times are processor time; latencies are the fastest of {asked.rounds}
interleaved rounds, in brackets how many times faster than the dense network. "Masked" is the pruned network with zeros
for weights, "compacted" what `certprune compact` makes of it. The dense network shrinks too: some of its units never
fire anywhere in [0, 1]^d.

## Size

Parameters, entries that are not zero, bytes of the safetensors file and of that file compressed (gzip);
multiply-adds of convolutions and linear layers for one image, and those among them whose weight is not zero. Gap: the
largest difference of logits from the masked network's on {POINTS:,} inputs, random points and corners of [0, 1]^d,
relative to the largest logit.

{table(("Network", "Form", "Parameters", "Not zero", "Bytes", "Compressed", "Multiply-adds", "Fewer than dense",
        "Of weights not zero", "Gap"), sizes)}

## Latency, milliseconds

{table(("Network", "Form", *by_engine), speeds)}

## Certification

The first {asked.count} test images by CROWN and by the cascade, without attack, seconds in all. Certified by the masked
and by the compacted network, and on how many images both say the same.

{table(("Network", "Method", "Masked, s", "Compacted, s", "Faster", "Certified, masked", "Certified, compacted",
        "The same"), proofs)}
"""  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", action="append", help="default: all pruned ones of the run")
    parser.add_argument("--prune", action="append", type=float, default=[], metavar="SPARSITY")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("-o", "--out", type=Path)
    asked = parser.parse_args()
    run = open_run(asked.run)
    shape = tuple(run.stage_record("pretrain")["input_shape"])
    nets = networks(run, asked.variant or [v.name for v in run.recipe.variants if not v.dense], asked.prune, shape)
    costs = {net.title: cost_of(net.model, shape) for net in nets}
    pairs = zip(nets[::2], nets[1::2], strict=True)
    gaps = {small.title: largest_gap(masked.model, small.model, shape) for masked, small in pairs}
    times = latencies(nets, torch.rand(max(BATCHES), *shape), asked.rounds)
    proofs = certification(run, nets, asked.count)
    text = page(nets, size_rows(nets, costs, gaps), latency_rows(nets, times), proofs, asked)
    print(text)
    if asked.out is not None:
        write_text(asked.out, text)


if __name__ == "__main__":
    main()
