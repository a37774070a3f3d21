"""VNN-LIB properties: what is read, what is written, what is refused; by hand and against random points."""

import gzip
import re
from fractions import Fraction

import pytest
import torch

from certifiers.errors import InputError
from certifiers.vnncomp import parse_property, parse_witness, read_property, robustness_text, witness_text
from certifiers.vnncomp.query import Box, Polytope
from certifiers.vnncomp.witness import Witness

DECLARED = "".join(f"(declare-const X_{i} Real)" for i in range(2)) + "".join(
    f"(declare-const Y_{j} Real)\n" for j in range(3)
)
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1)) (assert (and (<= X_1 0.5) (>= X_1 0.25))) ; a comment ( with\n"


def read(text):
    return parse_property(DECLARED + text)


def rows(polytope):
    return [(*a, b) for a, b in zip(polytope.a.tolist(), polytope.b.tolist(), strict=True)]


def test_a_conjunction_is_one_polytope():
    question = read(BOX + "(assert (<= Y_0 Y_1)) (assert (>= (+ Y_0 (* 2 Y_2) (- 1)) (- 3 Y_1)))")
    assert (question.inputs, question.outputs, len(question.boxes)) == (2, 3, 1)
    box = question.boxes[0]
    assert box.lower.tolist() == [-1, 0.25] and box.upper.tolist() == [1, 0.5]
    # y0 - y1 <= 0, and y0 + 2 y2 - 1 >= 3 - y1, that is -y0 - y1 - 2 y2 <= -4.
    assert [rows(p) for p in box.polytopes] == [[(1, -1, 0, 0), (-1, -1, -2, -4)]]


def test_a_disjunction_is_several_polytopes_of_one_box():
    question = read(BOX + "(assert (or (and (>= Y_0 Y_1)) (and (<= Y_2 1) (<= Y_1 -2e-1)) (>= Y_0 7)))")
    (box,) = question.boxes
    assert [rows(p) for p in box.polytopes] == [
        [(-1, 1, 0, 0)],
        [(0, 0, 1, 1), (0, 1, 0, pytest.approx(-0.2, abs=1e-15))],
        [(-1, 0, 0, -7)],
    ]


def test_boxes_may_be_several_and_hold_inputs_and_outputs():
    inside = "(and (>= X_0 {}) (<= X_0 {}) (>= X_1 0) (<= X_1 1) (>= Y_0 {}))"
    question = read(f"(assert (or {inside.format(0, 1, 5)} {inside.format(2, 3, 6)} {inside.format(0, 1, 7)}))")
    assert [(b.lower[0].item(), len(b.polytopes)) for b in question.boxes] == [(0, 2), (2, 1)]
    # Two disjunctions multiply out; each input box with each condition on the outputs.
    question = read(
        BOX + "(assert (or (<= X_0 0) (>= X_0 0)))" + "(assert (or (>= Y_0 Y_1) (>= Y_2 Y_1)))(assert (<= Y_1 9))"
    )
    assert [(b.lower[0].item(), b.upper[0].item()) for b in question.boxes] == [(-1, 0), (0, 1)]
    assert all([len(p.b) for p in b.polytopes] == [2, 2] for b in question.boxes)


def test_what_cannot_be_has_no_boxes():
    assert read(BOX + "(assert (>= X_0 2))").boxes == ()
    assert read(BOX + "(assert false)").boxes == () and read(BOX + "(assert (or))").boxes == ()
    assert len(read(BOX + "(assert (or (>= X_0 2) (>= Y_0 1)))").boxes[0].polytopes) == 1
    assert read(BOX + "(assert (>= 1 2))").boxes == ()


def test_without_a_condition_on_outputs_every_input_counts():
    (box,) = read(BOX).boxes
    assert bool(box.polytopes[0].excess(torch.randn(5, 3)).le(0).all())


def test_random_points_agree_with_the_text():
    """Evaluated as Python on random points, the formula says the same as the boxes and polytopes."""
    formula = (
        "(or (and (<= Y_0 Y_1) (>= (+ Y_2 Y_0) 0.5)) (and (>= X_0 0.5) (or (<= Y_1 -1) (<= (* -2 Y_0) (- Y_2 Y_1)))))"
    )
    question = read(BOX + f"(assert {formula})")
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        x = torch.rand(2, generator=generator, dtype=torch.float64) * torch.tensor([2.4, 0.4]) - torch.tensor(
            [1.2, -0.2]
        )
        y = torch.randn(3, generator=generator, dtype=torch.float64)
        (x0, x1), (y0, y1, y2) = x.tolist(), y.tolist()
        truth = (y0 <= y1 and y2 + y0 >= 0.5) or (x0 >= 0.5 and (y1 <= -1 or -2 * y0 <= y2 - y1))
        truth = truth and -1 <= x0 <= 1 and 0.25 <= x1 <= 0.5
        assert question.is_counterexample(x, y) == truth
        seen.add(truth)
    assert seen == {True, False}


def test_decimals_are_rounded_outward():
    """0.1 lies between two floats: the box takes the outer one, whichever end it is."""
    (box,) = read(
        "(assert (>= X_0 0.1))(assert (<= X_0 0.7))(assert (= X_1 0.3))(assert (<= Y_0 0.1))(assert (>= Y_0 0.1))"
    ).boxes
    lower, upper = box.lower.tolist(), box.upper.tolist()
    assert Fraction(lower[0]) < Fraction(1, 10) and Fraction(upper[0]) > Fraction(7, 10)
    assert Fraction(lower[1]) <= Fraction(3, 10) <= Fraction(upper[1]) and lower[1] < upper[1]
    (polytope,) = box.polytopes
    least, most = -polytope.b[1].item(), polytope.b[0].item()
    assert Fraction(least) < Fraction(1, 10) < Fraction(most)


@pytest.mark.parametrize("scale", ["1e-400", "1e-200 1e-200", "1e200 1e200"])
def test_factors_that_no_float_holds_are_scaled(scale):
    """Y_0 + 2 Y_1 <= 3, all of it times the scale."""
    (box,) = read(BOX + f"(assert (<= (* {scale} (+ Y_0 (* 2 Y_1))) (* 3 {scale})))").boxes
    ((first, second, third, b),) = rows(box.polytopes[0])
    assert (first, second, third, b) == (0.5, 1.0, 0.0, 1.5)


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        (BOX + "(assert (<= Y_0 Y_1)", ["never closed"]),
        (BOX + "(assert (<= Y_0 Y_1)))", ["too many"]),
        (BOX + "(assert (< Y_0 Y_1))", ["(< Y_0 Y_1)", "<="]),
        (BOX + "(assert (<= Y_0 X_1))", ["joins"]),
        (BOX + "(assert (<= X_0 X_1))", ["joins"]),
        (BOX + "(assert (<= (* Y_0 Y_1) 1))", ["not linear"]),
        (BOX + "(assert (<= Y_0 1e400))", ["1e400"]),
        (BOX + "(assert (<= Y_3 1))", ["Y_3", "not declared"]),
        (BOX + "(assert (<= (* 1e-200 1e-200 Y_0) 1))", ["too large for a float"]),
        (BOX.replace("(<= X_0 1)", "(<= (* 1e-200 1e-200 X_0) 1)"), ["too large for a float"]),
        (BOX + "(check-sat)", ["check-sat"]),
        ("(assert (<= X_0 1))(assert (<= X_1 1))(assert (>= X_1 0))", ["X_0 has no lower bound"]),
        ("(assert (and" + " (or (<= Y_0 1) (<= Y_1 1))" * 20 + "))", ["100000"]),
    ],
)
def test_refusals(text, saying):
    with pytest.raises(InputError) as caught:
        read(text)
    assert all(word in str(caught.value) for word in saying), caught.value


def test_files_may_be_compressed(tmp_path):
    text = DECLARED + BOX + "(assert (<= Y_0 1))"
    (tmp_path / "a.vnnlib").write_text(text)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = read_property(tmp_path / "a.vnnlib"), read_property(tmp_path / "a.vnnlib.gz")
    assert rows(plain.boxes[0].polytopes[0]) == rows(packed.boxes[0].polytopes[0]) == [(1, 0, 0, 1)]
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    for name in ("cut.gz", "missing.vnnlib"):
        with pytest.raises(InputError, match=re.escape(name)):
            read_property(tmp_path / name)


def test_robustness_reads_back_to_the_bit():
    generator = torch.Generator().manual_seed(1)
    lower = torch.rand(2, 3, generator=generator) * torch.tensor([1.0, 1e-7, 0.0])
    upper = lower + torch.tensor([0.1, 1e-9, 0.0])
    text = robustness_text(lower, upper, 1, 4, "about this")
    assert not re.search(r"\de-", text)  # no exponents: some verifiers cannot read them
    (box,) = parse_property(text).boxes
    assert torch.equal(box.lower, lower.double().flatten()) and torch.equal(box.upper, upper.double().flatten())
    assert sorted(map(rows, box.polytopes)) == sorted(
        [[tuple(float(v) for v in (-(j == 0), 1, -(j == 2), -(j == 3), 0))] for j in (0, 2, 3)]
    )


def test_a_box_in_floats_is_within():
    box = Box(torch.tensor([0.1, 0.3]).double() * 1.0, torch.tensor([0.2, 0.3]).double(), ())
    thin = torch.tensor([1 + 1e-12, 0.1], dtype=torch.float64)
    narrow = Box(thin, thin + 1e-13, ())
    for case in (
        box,
        Box(torch.tensor([0.1, -0.7], dtype=torch.float64), torch.tensor([0.7, 0.1], dtype=torch.float64), ()),
    ):
        lower, upper = case.inner(torch.float32)
        assert (lower.double() >= case.lower).all() and (upper.double() <= case.upper).all() and case.holds(lower)
        assert not case.holds(torch.nextafter(upper, torch.tensor(9.0)))
        assert not case.holds(torch.full_like(lower, float("nan")))
    lower, upper = narrow.inner(torch.float32)  # no float32 within: the nearest stands for it
    assert torch.equal(lower, upper) and torch.equal(lower, thin.float())


def test_excess_is_that_of_the_worst_row():
    polytope = Polytope(torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double(), torch.tensor([1.0, 2.0]).double())
    assert polytope.excess(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, -5.0]])).tolist() == [-1.0, 3.0, 3.0]


def test_witnesses_there_and_back():
    x, y = torch.tensor([0.1, -2.0, 1e-12]), torch.tensor([3.5])
    text = witness_text(Witness(x, y))
    assert text.startswith("((X_0 0.1") and text.endswith("(Y_0 3.5))") and text.count("\n") == 3
    assert torch.equal(parse_witness("sat\n" + text, 3).float(), x)
    assert parse_witness("Input assignment:\n\tx0 = 0.5\n\tx1 = -1\nOutput:\n\ty0 = 2", 2).tolist() == [0.5, -1.0]
    assert parse_witness("sat", 2) is None
    with pytest.raises(InputError, match="X_0 to X_3"):
        parse_witness(text, 4)
