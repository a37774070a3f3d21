"""benchmarks/vnncomp.py on a made-up checkout: what it counts as decided, and as wrong."""

import importlib.util
import sys
from pathlib import Path

import pytest

from certifiers import LinfBall
from certifiers.vnncomp import write_instances
from tests.nets import images, tiny_mlp

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "vnncomp.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_vnncomp", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def checkout(tmp_path):
    """Two properties of a network: one that holds (eps 0) and one that does not (eps 1)."""
    net, (x, _) = tiny_mlp(), images(1)
    folder = tmp_path / "benchmarks" / "tiny"
    for eps in (0.0, 1.0):
        write_instances(net, x, net(x).argmax(1), LinfBall(eps), folder, name="tiny", timeout=20)
    (folder / "instances.csv").rename(folder / "tiny_instances.csv")
    return tmp_path


def results(folder, *verdicts):
    """A copy of the published results, in which each tool gave these two verdicts."""
    (folder / "results_csv").mkdir(parents=True)
    for tool, both in enumerate(verdicts):
        lines = [
            f"tiny,./benchmarks/tiny/onnx/tiny.onnx,./benchmarks/tiny/vnnlib/tiny-eps-{eps}-0.vnnlib,1,{verdict},2\n"
            for eps, verdict in zip((0, 1), both, strict=True)
        ]
        (folder / "results_csv" / f"tool{tool}.csv").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("verdicts", "wrong", "known"),
    [
        ([("holds", "violated"), ("UNSAT", "timeout")], 0, 2),
        ([("unsat", "unsat"), ("timeout", "")], 1, 2),
        ([("unsat", "unsat"), ("unsat", "sat"), ("sat", "sat")], 0, 2),  # most tools are believed
        ([("unsat", "unsat"), ("sat", "sat")], 0, 0),  # nobody is
    ],
)
def test_verdicts_are_held_against_those_of_most_tools(
    benchmark, checkout, verdicts, wrong, known, monkeypatch, capsys
):
    folder = results(checkout / "published", *verdicts)
    page = checkout / "page.md"
    words = [str(checkout), str(folder), "--benchmark", "tiny", "--timeout", "15", "-o", str(page)]
    monkeypatch.setattr(sys, "argv", ["vnncomp.py", *words])
    assert benchmark.main() == (1 if wrong else 0)
    cells = [cell.strip() for cell in page.read_text().splitlines()[2].strip("|").split("|")]
    assert cells[:9] == ["tiny", "2", "2", "1", "1", "0", "0", str(wrong), str(known)]
    assert ("WRONG" in capsys.readouterr().out) == bool(wrong)


def test_some_instances_are_spread_over_the_list(benchmark, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "many_instances.csv").write_text("".join(f"n.onnx,p{i}.vnnlib,9\n" for i in range(10)))
    assert [p.name for _, p, _ in benchmark.instances(folder, 3)] == ["p0.vnnlib", "p3.vnnlib", "p6.vnnlib"]
    assert len(benchmark.instances(folder, None)) == len(benchmark.instances(folder, 50)) == 10
