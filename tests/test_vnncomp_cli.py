"""``export``, ``verify`` and ``certify --external`` on a small run; a real verifier, and programs that misbehave."""

import csv
import gzip
import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from certifiers.errors import InputError
from certifiers.verdict import Status, read_ledger, summarise
from certifiers.vnncomp import (
    export_onnx,
    parse_witness,
    read_network,
    read_property,
    run_external,
    tool_name,
    verify,
)
from certprune.data import load_data
from certprune.reports import read_run
from certprune.runs import open_run
from tests.commands import ONE_EPOCH, ROOT, VARIANT, ledger_path, smoke_run

VERIFY = shlex.join([sys.executable, str(ROOT / "run.py"), "verify"]) + " {onnx} {vnnlib} --timeout {timeout}"
MARABOU = shlex.quote(str(Path(sys.executable).parent / "Marabou")) + " {onnx} {vnnlib} --timeout={timeout}"
needs_marabou = pytest.mark.skipif(importlib.util.find_spec("maraboupy") is None, reason="no maraboupy here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run certified by intervals alone and attacked in one step, which leaves images undecided."""
    weak = (
        "pretrain.epochs=2",
        "certify.methods=[ibp]",
        "certify.attack_steps=1",
        "certify.eps=[0.02, 0.05]",
        "certify.count=30",
    )
    return smoke_run(tmp_path_factory.mktemp("finished") / "smoke", *ONE_EPOCH, *weak)


def ledger(work, name="eps-0.05"):
    return ledger_path(work, name)


def undecided(path):
    return [v.index for v in read_ledger(path)[1] if v.status in (Status.unknown, Status.timeout)]


def program(folder, name, code):
    """A command that runs this Python code, with the two files as its arguments."""
    (folder / f"{name}.py").write_text("import sys, time\nonnx, vnnlib = sys.argv[1:3]\n" + code)
    return shlex.join([sys.executable, str(folder / f"{name}.py")]) + " {onnx} {vnnlib}"


# ---- export and verify


def test_export_then_verify(cli, work):
    assert cli("export", work, "bench", "--variant", VARIANT, "--eps", "0.02", "--eps", "1/20", "--index", "2:12") == 0
    assert "opset 13" in cli.out and "predicted wrong" in cli.out and "instances.csv" in cli.out
    lines = list(csv.reader(Path("bench/instances.csv").read_text().splitlines()))
    model, data = open_run(work).load_model(VARIANT), load_data("digits", seed=0, validation=0.1)
    right = [i for i in range(2, 12) if model(data.test.x[i : i + 1]).argmax() == data.test.y[i]]
    assert len(right) > 3
    expected = [f"vnnlib/{VARIANT}-eps-{eps}-{i}.vnnlib" for eps in ("0.02", "0.05") for i in right]
    assert [line[1] for line in lines] == expected and {line[2] for line in lines} == {"60"}
    network = read_network(Path("bench") / lines[0][0])
    x = data.test.x[:20]
    assert torch.allclose(network.runtime(x.flatten(1)), model(x), atol=1e-5)
    known = {v.index: v.status for v in read_ledger(ledger(work))[1]}
    for onnx, vnnlib, _ in lines[len(right) :][:4]:
        assert cli("verify", Path("bench") / onnx, Path("bench") / vnnlib, "--timeout", "20") == 0
        said, _, text = cli.out.partition("\n")
        status = known[int(vnnlib.removesuffix(".vnnlib").split("-")[-1])]
        assert said in {"certified": ["unsat"], "falsified": ["sat"]}.get(status.value, ["sat", "unsat"])
        if said == "sat":
            question = read_property(Path("bench") / vnnlib)
            point = parse_witness(text, 64).float()
            assert question.is_counterexample(point, network.runtime(point.unsqueeze(0))[0])


def test_verify_reads_compressed_properties(cli, work):
    cli("export", work, "bench", "--variant", VARIANT, "--eps", "0.3", "--count", "3")
    onnx, vnnlib, _ = next(csv.reader(Path("bench/instances.csv").read_text().splitlines()))
    Path("p.vnnlib.gz").write_bytes(gzip.compress((Path("bench") / vnnlib).read_bytes()))
    assert cli("verify", Path("bench") / onnx, "p.vnnlib.gz", "--timeout", "20") == 0
    assert cli.out.startswith("sat\n((X_0 ") and "attack" in cli.err  # at eps 0.3 nothing holds


def test_mistakes(cli, work):
    cli.refuses("export", work, "bench", "--format", "tar", saying=["--format", "vnncomp"])
    cli.refuses("export", work, "bench", "--index", "5:99999", saying=["0:", "99999"])
    cli.refuses("export", work, "bench", "--timeout", "0", saying=["--timeout"])
    cli.refuses("verify", "no.onnx", "no.vnnlib", saying=["There is no network no.onnx"])
    cli.refuses("certify", work, "--external", "tool {onnx}", saying=["{vnnlib}", "tool {onnx}"])
    cli.refuses("certify", work, "--external", "tool {onnx} {vnnlib} {eps}", saying=["{eps}", "may hold"])
    cli.refuses("certify", work, "--external", "tool '{onnx} {vnnlib}", saying=["cannot be split"])
    asked = ("--variant", VARIANT, "--eps", "0.05")
    cli.refuses(
        "certify", work, *asked, "--external", "no-such-tool {onnx} {vnnlib}", saying=["no-such-tool", "Install"]
    )
    assert not Path("bench").exists()


# ---- other verifiers


@needs_marabou
def test_a_verifier_from_pypi_decides_the_rest(cli, work):
    before, open_ = ledger(work).read_bytes(), undecided(ledger(work))
    assert len(open_) >= 2
    command = (
        "certify",
        work,
        "--variant",
        VARIANT,
        "--eps",
        "0.05",
        "--external-timeout",
        "20",
        "--external",
        MARABOU,
    )
    assert cli(*command) == 0
    path = ledger(work, "eps-0.05-external-Marabou-20s")
    assert ledger(work).read_bytes() == before and f"{path}: 30 images" in cli.out
    header, verdicts = read_ledger(path)
    assert header["method"] == "ibp+external:Marabou" and "{vnnlib}" in header["external"]
    old = {v.index: v for v in read_ledger(ledger(work))[1]}
    for verdict in verdicts:
        if verdict.index not in open_:
            assert verdict == old[verdict.index]
        elif verdict.status is not Status.unknown:  # a witness in six digits may not hold up
            assert verdict.method == "external:Marabou" and verdict.margin is None
    # The same questions, decided by our own program: two verifiers that share no code agree.
    few = open_[:1]
    asked = ("--variant", VARIANT, "--eps", "0.05", "--index", f"0:{few[-1] + 1}", "--external-timeout", "200")
    assert cli("certify", work, *asked, "--external", VERIFY) == 0
    own = {v.index: v.status for v in read_ledger(ledger(work, "eps-0.05-external-run-200s"))[1]}
    theirs = {v.index: v.status for v in verdicts}
    decided = [i for i in few if theirs[i] in (Status.certified, Status.falsified)]
    assert decided and all(own[i] is theirs[i] for i in decided)
    written = path.read_bytes()
    assert cli(*command) == 0 and path.read_bytes() == written  # nothing is asked twice
    assert {v.name for v in read_run(work).variants} >= {VARIANT}  # reports read such a run


def test_what_a_program_says_is_checked(cli, work):
    """ "unsat" is taken at its word, "sat" only with an input that changes the network's own prediction."""
    open_ = undecided(ledger(work))
    asked = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--external")
    assert cli(*asked, program(work, "yes", "print('unsat')")) == 0
    found = {v.index: v for v in read_ledger(ledger(work, "eps-0.05-external-yes-60s"))[1]}
    assert all(found[i].status is Status.certified and found[i].method == "external:yes" for i in open_)

    false = "print('sat\\n(' + ' '.join(f'(X_{i} 0.5)' for i in range(64)) + ')')"
    assert cli(*asked, program(work, "false", false)) == 0
    found = {v.index: v for v in read_ledger(ledger(work, "eps-0.05-external-false-60s"))[1]}
    assert all(found[i].status is Status.unknown for i in open_)
    assert "does not change the network's prediction" in cli.out and f"image {open_[0]}" in cli.out

    assert cli(*asked, program(work, "bare", "print('sat')")) == 0
    assert "no counterexample" in cli.out and len(undecided(ledger(work, "eps-0.05-external-bare-60s"))) == len(open_)


def test_a_counterexample_is_brought_into_the_threat_set(cli, work):
    """A witness far outside its box proves nothing by itself; what of it lies within the box is what counts."""
    data, model = load_data("digits", seed=0, validation=0.1), open_run(work).load_model(VARIANT)
    wild = "print('sat\\n(' + ' '.join(f'(X_{i} {50 * (-1) ** i})' for i in range(64)) + ')')"
    cli("certify", work, "--variant", VARIANT, "--eps", "0.05", "--external", program(work, "wild", wild))
    signs = torch.tensor([1.0, -1.0]).repeat(32).reshape(1, 1, 8, 8)
    found = {v.index: v for v in read_ledger(ledger(work, "eps-0.05-external-wild-60s"))[1]}
    for i in undecided(ledger(work)):
        point = (data.test.x[i : i + 1] + 0.05 * signs).clamp(0, 1)
        breaks = int(model(point).argmax()) != found[i].label
        assert found[i].status is (Status.falsified if breaks else Status.unknown)


def test_crashes_are_told_and_asked_again(cli, work):
    open_ = undecided(ledger(work))
    asked = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--external")
    assert cli(*asked, program(work, "tool", "raise SystemExit('out of memory')")) == 0
    assert "out of memory" in cli.out and "code 1" in cli.out
    path = ledger(work, "eps-0.05-external-tool-60s")
    before = read_ledger(ledger(work))[1]
    assert read_ledger(path)[1] == before and f"{path}: {summarise(before)}" in cli.out  # what was open still counts
    header = json.loads(path.read_text().splitlines()[0])
    half = "import re\nindex = int(re.search(r'input (\\d+)', open(vnnlib).read())[1])\n"
    half += f"print('unsat') if index == {open_[0]} else sys.exit('no licence')"
    assert cli(*asked, program(work, "tool", half)) == 0 and "no licence" in cli.out
    assert f"1 decided, trouble: image {open_[1]}" in cli.out and undecided(path) == open_[1:]
    assert summarise(read_ledger(path)[1]).certified.count == summarise(before).certified.count + 1
    assert cli(*asked, program(work, "tool", "print('unsat')")) == 0  # mended
    assert not undecided(path) and json.loads(path.read_text().splitlines()[0]) == header
    assert f"{len(open_) - 1} of {len(open_) - 1} decided" in cli.out
    assert [v.index for v in read_ledger(path)[1]] == [v.index for v in before]


def test_another_command_or_time_is_another_verifier(cli, work):
    asked = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--external")
    tool = program(work, "tool", "print('unknown')")
    assert cli(*asked, tool) == 0
    path = ledger(work, "eps-0.05-external-tool-60s")
    content, open_ = path.read_bytes(), undecided(path)
    program(work, "tool", "print('unsat')")
    assert cli(*asked, tool) == 0 and path.read_bytes() == content  # it was asked, and knew nothing
    cli.refuses(*asked, f"{tool} --thorough", saying=["another external", "--thorough", "move that file away"])
    assert path.read_bytes() == content
    assert cli(*asked, tool, "--external-timeout", "90") == 0
    other = ledger(work, "eps-0.05-external-tool-90s")
    assert open_ and not undecided(other) and read_ledger(other)[0]["timeout"] == 90
    assert path.read_bytes() == content


def test_a_ledger_that_is_not_whole_is_asked_about_as_far_as_it_goes(cli, work, monkeypatch):
    """As after --run-seconds: what it lacks is left out, and that is said."""
    base, tool = ledger(work), program(work, "tool", "print('unsat')")
    base.write_text("".join(base.read_text().splitlines(keepends=True)[:21]))
    monkeypatch.setattr("certprune.cli.certifying.Countdown", lambda seconds: lambda: 1e-9)
    asked = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--run-seconds", "1", "--external", tool)
    assert cli(*asked) == 0, cli.err
    path = ledger(work, "eps-0.05-external-tool-60s")
    assert [v.index for v in read_ledger(path)[1]] == list(range(20)) and not undecided(path)
    assert "eps-0.05.jsonl is not whole: 20 of the 30 images asked for are in it" in cli.out
    for name in (base, path):
        assert f"Cut short: {name}: 20 of the 30 images asked for are in it" in cli.out
    monkeypatch.undo()
    assert cli(*asked[:6], "--external", tool) == 0 and "Cut short" not in cli.out
    assert len(read_ledger(path)[1]) == 30 and not undecided(path)


@pytest.mark.parametrize(
    ("code", "verdict", "saying"),
    [
        ("print('verifying unsat\\nresult follows\\nUNSAT.')", "unsat", ""),
        ("print('holds')", "unsat", ""),
        ("print('unsat'); sys.exit(3)", "error", "code 3"),
        ("print('all is unsat')", "error", "no verdict: all is unsat"),
        ("pass", "error", "it printed nothing"),
        ("print('unknown')", "unknown", ""),
        ("print('timeout')", "timeout", ""),
        ("print('violated\\n((X_0 1) (X_1 2.5e-1))')", "sat", ""),
        ("print('sat\\n((X_0 1))')", "sat", "X_0 to X_1"),
    ],
)
def test_verdicts_are_read(code, verdict, saying, tmp_path):
    answer = run_external(program(tmp_path, "tool", code), Path("a"), Path("b"), 20, 2)
    assert answer.verdict == verdict and saying in answer.note
    assert (answer.candidate is not None) == (verdict == "sat" and not saying)


def test_a_verdict_may_be_left_in_a_file(tmp_path):
    command = program(tmp_path, "tool", "open(sys.argv[3], 'w').write('unsat\\n'); print('sat')") + " {result}"
    assert run_external(command, Path("a"), Path("b"), 20, 2).verdict == "unsat"


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    from certifiers.vnncomp import external

    monkeypatch.setattr(external, "GRACE", 0.5)
    code = f"""import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2.5); open({str(tmp_path / "alive")!r}, 'w')"])
time.sleep(60)"""
    begin = time.monotonic()
    answer = run_external(program(tmp_path, "tool", code), Path("a"), Path("b"), 1, 2)
    assert answer.verdict == "timeout" and "killed" in answer.note and time.monotonic() - begin < 2.4
    time.sleep(max(0.0, 3.2 - (time.monotonic() - begin)))
    assert not (tmp_path / "alive").exists()


def test_tools_are_called_by_name():
    for command, name in (
        ("/opt/bin/Marabou {onnx} {vnnlib}", "Marabou"),
        ("python3 -u tools/my-tool.py {onnx} {vnnlib}", "my-tool"),
        ("bash 'run it.sh' {onnx} {vnnlib}", "run-it"),
    ):
        assert tool_name(command) == name
    with pytest.raises(InputError):
        tool_name("Marabou")


@needs_marabou
@pytest.mark.parametrize("seed", range(8))
def test_verify_agrees_with_marabou(seed, tmp_path):
    """Random nets and questions with disjunctions of conjunctions, at thresholds near what is reached."""
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU())
    net.append(torch.nn.Linear(8, 2)).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    export_onnx(net, torch.rand(3, 3), tmp_path / "net.onnx")
    y = net(2 * torch.rand(5000, 3, generator=generator) - 1).detach()
    levels = y[torch.randint(len(y), (2,), generator=generator)] + 0.3 * torch.randn(2, 2, generator=generator)
    if seed % 2:  # out of reach in one output, so that there is something to prove
        levels[:, seed // 2 % 2] = y[:, seed // 2 % 2].max() + 0.05
    bounds = "".join(f"(declare-const X_{i} Real)(assert (<= X_{i} 1))(assert (>= X_{i} -1))\n" for i in range(3))
    both = " ".join(f"(and (>= Y_0 {a:.4f}) (>= Y_1 {b:.4f}))" for a, b in levels.tolist())
    text = "(declare-const Y_0 Real)(declare-const Y_1 Real)\n" + bounds + f"(assert (or {both}))\n"
    (tmp_path / "p.vnnlib").write_text(text)
    ours = verify(read_network(tmp_path / "net.onnx"), read_property(tmp_path / "p.vnnlib"), 20)
    theirs = run_external(MARABOU, tmp_path / "net.onnx", tmp_path / "p.vnnlib", 20, 3)
    assert ours.verdict == theirs.verdict, theirs.note
    assert ours.verdict == "unsat" or not seed % 2
