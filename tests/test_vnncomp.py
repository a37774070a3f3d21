"""Networks as ONNX, there and back, and what is proven or broken about them; witnesses, searches, soundness."""

import importlib
import time

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from certifiers import LinfBall, margin_lower_bounds
from certifiers.bounds import trace
from certifiers.errors import InputError, UnsupportedLayer
from certifiers.vnncomp import (
    Box,
    Polytope,
    Property,
    export_onnx,
    parse_property,
    read_network,
    read_property,
    robustness_text,
    verify,
    write_instances,
)
from certifiers.vnncomp.bounding import Rows, excluded, excluded_by_combination, intervals_of, tightened
from certifiers.vnncomp.complete import split_relus
from certifiers.vnncomp.left import Left
from certifiers.vnncomp.splitting import split_inputs
from certprune.models.normalise import Normalise
from tests.nets import NETS, images, tiny_mlp
from tests.onnx_files import made


def small_net(inputs=3, outputs=3, seed=0, hidden=12):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / (2.0 if parameter.dim() == 1 else 2.5)
    return net.eval().requires_grad_(False)


def exported(net, shape, folder, seed=0):
    path = folder / "net.onnx"
    export_onnx(net, torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed)), path)
    return read_network(path)


# ---- export


@pytest.mark.parametrize("name", NETS)
def test_a_network_goes_there_and_back(name, tmp_path):
    net, (x, y) = NETS[name](), images()
    path = tmp_path / "net.onnx"
    export_onnx(net, x, path)
    network = read_network(path)
    assert torch.allclose(network.model(x.flatten(1)), net(x), atol=1e-5)
    assert torch.allclose(network.runtime(x.flatten(1)), net(x), atol=1e-5)
    # Its bounds are those of the network itself.
    for method in ("ibp", "crown"):
        expected = margin_lower_bounds(net, x, y, LinfBall(0.02), method)
        assert torch.allclose(
            margin_lower_bounds(network.model, x.flatten(1), y, LinfBall(0.02), method), expected, atol=1e-3
        )
    file = onnx.load(str(path))
    assert [o.version for o in file.opset_import] == [13]
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 8, 8]
    assert not {"Where", "Cast", "And", "Greater"} & {node.op_type for node in file.graph.node}, "no masks"


def test_normalisation_is_exported_too(tmp_path):
    net, (x, _) = nn.Sequential(Normalise(0.3, 0.5), *tiny_mlp()).eval(), images()
    export_onnx(net, x, tmp_path / "net.onnx")
    assert torch.allclose(read_network(tmp_path / "net.onnx").model(x.flatten(1)), net(x), atol=1e-5)


def test_masks_are_refused(tmp_path):
    net, (x, _) = tiny_mlp(), images()
    nn.utils.prune.l1_unstructured(net[1], "weight", 0.5)
    with pytest.raises(InputError, match="masks"):
        export_onnx(net, x, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    net, (x, _) = tiny_mlp(), images()
    export = torch.onnx.export

    def broken(model, *arguments, **options):
        model[5].bias.data[3] += 0.01
        export(model, *arguments, **options)
        model[5].bias.data[3] -= 0.01

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(InputError, match="other values in onnxruntime"):
        export_onnx(net, x, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_instances_say_what_is_to_be_proven(tmp_path):
    net, (x, _) = tiny_mlp(), images(5)
    y = net(x).argmax(1)
    y[2] = (y[2] + 1) % 10  # predicted wrong: nothing to prove
    lines = write_instances(net, x, y, LinfBall(0.03), tmp_path, name="tiny", timeout=7, indices=[3, 5, 8, 9, 11])
    assert [line[1] for line in lines] == [f"vnnlib/tiny-eps-0.03-{i}.vnnlib" for i in (3, 5, 9, 11)]
    write_instances(net, x[:1], y[:1], LinfBall(0.01), tmp_path, name="tiny")
    text = (tmp_path / "instances.csv").read_text().splitlines()
    assert text[0] == "onnx/tiny.onnx,vnnlib/tiny-eps-0.03-3.vnnlib,7" and len(text) == 5
    (box,) = read_property(tmp_path / lines[1][1]).boxes
    lower, upper = LinfBall(0.03).box(x[1:2])
    assert torch.equal(box.lower, lower.double().flatten()) and torch.equal(box.upper, upper.double().flatten())
    assert box.lower.min() >= 0 and box.upper.max() <= 1
    for polytope in box.polytopes:  # a counterexample is where another logit reaches the label's
        assert (polytope.a[0, y[1]], polytope.a.sum(), polytope.b[0]) == (1, 0, 0)
    assert len(box.polytopes) == 9


def test_another_network_of_the_same_name_is_refused(tmp_path):
    x, y = images(5)[0], tiny_mlp()(images(5)[0]).argmax(1)
    write_instances(tiny_mlp(), x, y, LinfBall(0.03), tmp_path, name="tiny")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    other = tiny_mlp()
    with torch.no_grad():
        other[1].weight[0, 0] += 0.1
    with pytest.raises(InputError, match=r"tiny\.onnx is another network.*Nothing was written\. Give another folder"):
        write_instances(other, x, y, LinfBall(0.03), tmp_path, name="tiny")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    write_instances(other, x, y, LinfBall(0.03), tmp_path, name="other")
    written = onnx.load(str(tmp_path / "onnx" / "tiny.onnx"))
    written.producer_version = "1.0"  # by another torch, but the same network
    onnx.save(written, str(tmp_path / "onnx" / "tiny.onnx"))
    write_instances(tiny_mlp(), x, y, LinfBall(0.01), tmp_path, name="tiny")
    (tmp_path / "onnx" / "tiny.onnx").unlink()
    with pytest.raises(InputError, match=r"instances\.csv lists properties of .*tiny\.onnx, which is missing"):
        write_instances(other, x, y, LinfBall(0.03), tmp_path, name="tiny")


def test_no_two_eps_share_a_property(tmp_path):
    net, (x, _) = tiny_mlp(), images(1)
    for eps in (2 / 255, 0.00784314, 0.05):
        write_instances(net, x, net(x).argmax(1), LinfBall(eps), tmp_path)
    lines = (tmp_path / "instances.csv").read_text().splitlines()
    names = [f"vnnlib/network-eps-{eps}-0.vnnlib" for eps in ("0.00784313725490196", "0.00784314", "0.05")]
    assert [line.split(",")[1] for line in lines] == names
    for name, eps in zip(names, (2 / 255, 0.00784314, 0.05), strict=True):
        (box,) = read_property(tmp_path / name).boxes
        assert torch.equal(box.upper, LinfBall(eps).box(x)[1].double().flatten())


def test_l2_cannot_be_said_in_vnnlib(tmp_path):
    from certifiers import L2Ball

    x, y = images()
    with pytest.raises(InputError, match="linf"):
        write_instances(tiny_mlp(), x, y, L2Ball(0.1), tmp_path)


# ---- reading ONNX: operators are in test_vnncomp_operators.py


def test_a_network_that_is_read_wrongly_is_found_out(tmp_path, monkeypatch):
    from certifiers.vnncomp import operators

    monkeypatch.setitem(operators.OPERATORS, "Relu", operators.identity)
    with pytest.raises(UnsupportedLayer, match="other values than onnxruntime"):
        made(tmp_path, [("Relu", ["X"], ["Y"], {})], {}, [1, 5])


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no network")
    for name in ("a.onnx", "missing.onnx"):
        with pytest.raises(InputError, match=name):
            read_network(tmp_path / name)


def test_without_the_extra_the_command_to_install_it_is_named(monkeypatch):
    from certifiers.vnncomp.extras import need

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'certprune\[vnncomp\]'"):
        need("onnx.reference")


# ---- proofs and counterexamples


def by_hand(tmp_path, inputs=2):
    """y0 = relu(x0 + x1), y1 = relu(x0 - x1) on [-1, 1]^2: y0 + y1 is max(2 |x0|, ...), at most 2, each at most 2.

    More inputs than two change nothing.
    """
    weights = {"w": np.zeros((inputs, 2), dtype=np.float32)}
    weights["w"][:2] = [[1, 1], [1, -1]]
    return made(tmp_path, [("MatMul", ["X", "w"], ["h"], {}), ("Relu", ["h"], ["Y"], {})], weights, [1, inputs])


def square(inputs=2):
    names = [*(f"X_{i}" for i in range(inputs)), "Y_0", "Y_1"]
    ends = "".join(f"(assert (<= X_{i} 1))(assert (>= X_{i} -1))" for i in range(inputs))
    return "".join(f"(declare-const {name} Real)" for name in names) + ends


SQUARE = square()


@pytest.mark.parametrize("inputs", [2, 14])  # the box is halved, or the ReLUs are split
@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        ("(assert (>= Y_0 2.001))", "unsat"),
        ("(assert (>= Y_0 1.9))", "sat"),
        ("(assert (<= Y_1 -0.001))", "unsat"),
        ("(assert (>= (+ Y_0 Y_1) 2.001))", "unsat"),  # the two are never large together: intervals say 4
        ("(assert (>= (+ Y_0 Y_1) 1.99))", "sat"),
        ("(assert (>= Y_0 1.01))(assert (>= Y_1 1.01))", "unsat"),  # neither row is impossible by itself
        ("(assert (>= Y_0 0.9))(assert (>= Y_1 0.9))", "sat"),
        ("(assert (or (>= Y_0 2.1) (and (>= Y_1 1.5) (>= Y_0 0.6))))", "unsat"),
        ("(assert (or (>= Y_0 2.1) (and (>= Y_1 1.5) (<= Y_0 0.1))))", "sat"),
        ("(assert (or (and (<= X_0 0) (>= Y_0 1.1)) (and (>= X_0 0.5) (>= Y_1 1.6))))", "sat"),
        ("(assert (or (and (<= X_0 0) (>= Y_0 1.1)) (and (<= X_0 0.5) (>= Y_1 1.6))))", "unsat"),
        ("(assert (>= X_0 0.5))(assert (<= X_0 0.25))", "unsat"),
        ("", "sat"),
    ],
)
def test_questions_answered_by_hand(asked, verdict, inputs, tmp_path):
    question = parse_property(square(inputs) + asked)
    answer = verify(by_hand(tmp_path, inputs), question, 20)
    assert answer.verdict == verdict
    if verdict == "sat":
        x, y = answer.witness
        assert question.is_counterexample(x, y)
        assert torch.allclose(y, torch.stack([(x[0] + x[1]).relu(), (x[0] - x[1]).relu()]), atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_answers_agree_with_a_fine_grid(seed, tmp_path):
    """Random nets and conjunctions placed close to what is reached: no grid point refutes a proof."""
    net = small_net(2, 3, seed)
    network = exported(net, (2,), tmp_path)
    generator = torch.Generator().manual_seed(seed)
    ticks = torch.linspace(-1, 1, 301)
    grid = torch.cartesian_prod(ticks, ticks)
    reached = net(grid).double()
    box = [-torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    polytopes = []
    for _ in range(2):
        a = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        values = reached @ a.T
        centre = values[torch.randint(len(values), (1,), generator=generator)]
        least = (values - centre).amax(1).min()  # shifting by this makes the polytope just touched by the grid
        shift = least * (1.3 if seed % 2 else 0.7) - (0.02 if seed % 2 else -0.02)
        polytopes.append(Polytope(a, (centre + shift)[0]))
    question = Property(2, 3, (Box(*box, tuple(polytopes)),))
    answer = verify(network, question, 20)
    hit = any((polytope.excess(reached) <= 0).any() for polytope in polytopes)
    assert answer.verdict in ("sat", "unsat")
    assert not (hit and answer.verdict == "unsat")
    if answer.verdict == "sat":
        assert question.is_counterexample(*answer.witness)


def test_both_verdicts_come_up_and_no_proof_is_attacked(tmp_path):
    """Over many questions, what is proven stands against 20,000 random points each, and witnesses are real."""
    seen = []
    for seed in range(10):
        network = exported(small_net(4, 3, seed), (4,), tmp_path)
        generator = torch.Generator().manual_seed(seed)
        x = 2 * torch.rand(20_000, 4, generator=generator) - 1
        y = network.model(x).double()
        for quantile in (0.0, 0.002, -0.4):
            a = torch.randn(1, 3, generator=generator, dtype=torch.float64)
            values = (y @ a.T).flatten()
            level = values.quantile(quantile) if quantile >= 0 else values.min() + quantile
            ends = torch.ones(4, dtype=torch.float64)
            question = Property(4, 3, (Box(-ends, ends, (Polytope(a, level.reshape(1)),)),))
            answer = verify(network, question, 20)
            seen.append(answer.verdict)
            if answer.verdict == "unsat":
                assert (values > level).all()
            else:
                assert answer.verdict == "sat" and question.is_counterexample(*answer.witness)
    assert {"sat", "unsat"} == set(seen) and min(seen.count("sat"), seen.count("unsat")) >= 5


def test_a_combination_proves_what_no_row_does(tmp_path):
    network = by_hand(tmp_path)
    model = network.model.double()
    bound = trace(model, (2,)).bind()
    ends = torch.full((1, 2), 1.0, dtype=torch.float64)
    intervals = tightened(bound, intervals_of(bound, 0.2 * ends, ends))
    # On [0.2, 1]^2, y0 >= 1.9 and y1 >= 0.5 exclude each other: neither is impossible.
    polytope = Polytope(-torch.eye(2, dtype=torch.float64), torch.tensor([-1.9, -0.5], dtype=torch.float64))
    assert not excluded(bound, intervals, Rows([polytope]), "crown").any()
    assert excluded_by_combination(bound, intervals, polytope)
    possible = Polytope(polytope.a, torch.tensor([-1.9, -0.05], dtype=torch.float64))  # x = (1, 0.95)
    assert not excluded_by_combination(bound, intervals, possible)


def test_halving_stops_at_the_deadline_and_finds_what_is_there():
    model = small_net(3, 2, 5).double()
    ends = torch.ones(3, dtype=torch.float64)
    values = model(2 * torch.rand(50_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1)[:, 0]
    row = torch.tensor([[1.0, 0.0]]).double()
    there = [Polytope(row, values.quantile(0.01).reshape(1))]
    verdict, x = split_inputs(Left.of(model, -ends, ends, there, time.monotonic() + 20))
    assert verdict == "sat" and model(x.unsqueeze(0))[0, 0] <= there[0].b[0]
    gone = [Polytope(row, values.min().reshape(1) - 0.1)]
    assert split_inputs(Left.of(model, -ends, ends, gone, time.monotonic() + 20)) == ("unsat", None)
    assert split_inputs(Left.of(model, -ends, ends, gone, time.monotonic() - 1)) == ("timeout", None)


def test_a_false_witness_does_not_count(tmp_path):
    """What a search claims is run through onnxruntime; a claim that fails there leaves the question open."""
    network = by_hand(tmp_path)
    question = parse_property(SQUARE + "(assert (>= (+ Y_0 Y_1) 2.001))")
    calls = []

    def liar(left):
        calls.append(len(left.polytopes))
        return "sat", torch.zeros(2, dtype=torch.float64)

    answer = verify(network, question, 20, decide=liar)
    assert calls == [1] and answer.verdict == "unknown" and answer.witness is None
    assert verify(network, question, 20, decide=lambda *_: ("unknown", None)).verdict == "unknown"
    assert verify(network, question, 20, decide=lambda *_: ("timeout", None)).verdict == "timeout"


def test_a_search_gets_only_what_is_open(tmp_path):
    network = by_hand(tmp_path)
    question = parse_property(SQUARE + "(assert (or (>= Y_0 2.1) (>= (+ Y_0 Y_1) 2.001) (<= Y_1 -1)))")
    seen = []

    def decide(left):
        seen.append((left.lower.tolist(), left.upper.tolist(), [p.a.tolist() for p in left.polytopes]))
        assert torch.allclose(left.intervals.boxes[1].upper, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
        return "unsat", None

    assert verify(network, question, 20, decide=decide).verdict == "unsat"
    assert seen == [([-1, -1], [1, 1], [[[-1, -1]]])]


def test_a_property_of_another_network_is_refused(tmp_path):
    with pytest.raises(InputError, match="2 inputs and 1 outputs.*2 and 2"):
        verify(
            by_hand(tmp_path), parse_property(SQUARE.replace("(declare-const Y_1 Real)", "") + "(assert (<= Y_0 1))"), 5
        )


def test_relus_are_split_where_inputs_are_many(tmp_path):
    """A margin that CROWN leaves open and the search over ReLUs proves, and one that it breaks."""
    net, (x, _) = tiny_mlp(seed=3), images(1)
    label = int(net(x).argmax())
    export_onnx(net, x, tmp_path / "net.onnx")
    network = read_network(tmp_path / "net.onnx")
    verdicts = {}
    for eps in (0.02, 0.04, 0.06, 0.08):
        question = parse_property(robustness_text(*LinfBall(eps).box(x), label, 10))
        crown = verify(network, question, 30, decide=lambda *_: ("unknown", None)).verdict
        verdicts[eps] = (crown, verify(network, question, 30).verdict)
    assert all(both[0] in ("unknown", both[1]) for both in verdicts.values())
    assert ("unknown", "unsat") in verdicts.values(), verdicts


@pytest.mark.parametrize("seed", range(4))
def test_splitting_relus_is_right_on_either_side_of_the_minimum(seed):
    """Just above the least value that descent reaches there is a counterexample; well below there is none.

    Of one row, and of conjunctions: of two rows, of which the larger counts, and of three.
    """
    model = small_net(14, 2, seed, hidden=6).double()
    generator = torch.Generator().manual_seed(seed)
    ends = torch.ones(14, dtype=torch.float64)
    for rows in (torch.eye(2)[:1], torch.eye(2), torch.randn(3, 2, generator=generator)):
        rows = rows.double()
        shift = torch.randn(len(rows), generator=generator, dtype=torch.float64)
        x = 2 * torch.rand(150, 14, generator=generator, dtype=torch.float64) - 1
        for step in range(150):
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad((model(x) @ rows.T - shift).amax(1).sum(), x)
            x = (x.detach() - 0.3 * (1 - step / 150) ** 2 * gradient.sign()).clamp(-1, 1)
        least = (model(x) @ rows.T - shift).amax(1).min()
        verdicts = []
        for gap in (5e-3, -0.05, -0.1, -0.2, -0.4, -0.8):  # descent may miss the least of several rows by something
            polytope = Polytope(rows, shift + least + gap)
            verdict, found = split_relus(Left.of(model, -ends, ends, [polytope], time.monotonic() + 20))
            assert verdict == "unsat" or polytope.excess(model(found.unsqueeze(0))[0]) <= 0
            verdicts.append(verdict)
            if verdict == "unsat":
                break
        assert verdicts[0] == "sat" and verdicts[-1] == "unsat"
        assert len(rows) > 1 or len(verdicts) == 2


def test_the_search_over_relus_is_asked_what_the_polytopes_say(monkeypatch):
    """A proof that of every polytope a row exceeds its b by more than rounding, on this very box, nothing weaker."""
    from certifiers import exact

    asked = []

    def decide_rows(network, region, rows, offset, deadline, confirm, intervals, groups):
        confirmed = [confirm(p) for p in (-torch.ones(2), torch.ones(2))]
        asked.append((region.box, intervals, rows, offset, groups, confirmed))
        return exact.Outcome(proven=None, bound=0.0, witness=None, domains=1)

    monkeypatch.setattr(exact, "decide_rows", decide_rows)
    model = nn.Linear(2, 2, dtype=torch.float64)
    model.weight.data, model.bias.data = torch.eye(2).double(), torch.zeros(2).double()
    ends = torch.ones(2, dtype=torch.float64)
    rows = torch.tensor([[1.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    polytopes = [Polytope(rows[:1], torch.tensor([-2.5]).double()), Polytope(rows, torch.tensor([9.0, -3.0]).double())]
    left = Left.of(nn.Sequential(model).eval(), -ends, ends, polytopes, time.monotonic() + 5)
    assert split_relus(left) == ("timeout", None)
    ((box, intervals, a, offset, groups, confirmed),) = asked
    assert (box.lower <= -ends).all() and (box.upper >= ends).all()
    assert torch.allclose(box.upper, ends[None]) and intervals is left.intervals and intervals.reach is not None
    assert torch.equal(a, torch.cat([rows[:1], rows])) and groups.tolist() == [0, 1, 1]
    expected = torch.tensor([2.5, -9.0, 3.0]).double()
    assert (offset < expected).all() and torch.allclose(offset, expected)
    assert confirmed == [True, False]  # -3 <= -2.5 in the first; 3 > -2.5, and 3 <= 9 but -1 > -3


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_bounds_decide_linear_networks_exactly(method):
    """Where there is nothing to relax, a polytope is excluded exactly when the least value lies above it."""
    model = nn.Sequential(small_net(5, 3, 1)[0]).double()  # one linear layer, 12 outputs
    network = trace(model, (5,)).bind()
    ends = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper = ends.amin(0), ends.amax(0)
    intervals = intervals_of(network, lower[None], upper[None])
    row = torch.randn(1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = (row @ model[0].weight)[0]
    least = weights.clamp(min=0) @ lower + weights.clamp(max=0) @ upper + row[0] @ model[0].bias
    for gap, gone in ((1e-6, False), (-1e-6, True), (1e-12, False), (0.0, False)):
        rows = Rows([Polytope(row, (least + gap).reshape(1))])
        assert excluded(network, intervals, rows, method).tolist() == [[gone]]


@pytest.mark.parametrize("size", ["1e6", "1e28"])
def test_a_bound_that_is_no_number_proves_nothing(size, tmp_path):
    """y = relu(2 - |x - 5|) is 2 at 5; over a box of 1e28 rounding leaves the units without finite bounds."""
    weights = {"w1": [[1, -1]], "b1": [-5, 5], "w2": [[-1], [-1]], "b2": [2]}
    weights = {name: np.array(value, dtype=np.float32) for name, value in weights.items()}
    nodes = [
        ("Gemm", ["X", "w1", "b1"], ["a"], {}),
        ("Relu", ["a"], ["r"], {}),
        ("Gemm", ["r", "w2", "b2"], ["c"], {}),
        ("Relu", ["c"], ["Y"], {}),
    ]
    ends = f"(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 -{size}))(assert (<= X_0 {size}))"
    assert (
        verify(made(tmp_path, nodes, weights, [1, 1]), parse_property(ends + "(assert (>= Y_0 1))"), 8).verdict
        != "unsat"
    )
