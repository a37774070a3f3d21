"""The cascade: only open classes move on, verdicts are those of single methods, time ends it, counterexamples count."""

import builtins
import json
import time

import pytest
import torch

from certifiers.certification import METHODS, certify
from certifiers.errors import InputError, SoundnessError
from certifiers.methods import AT_ONCE, CASCADE, Answer, method_names
from certifiers.threat import L2Ball, LinfBall
from certifiers.verdict import Ledger, Status, read_ledger
from tests.nets import CLASSES, NETS, images

NONE = {"attack_steps": 0, "attack_restarts": 1}


def labelled(name, n=12):
    model, (x, _) = NETS[name](), images(n)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("ball", [LinfBall(0.06), L2Ball(0.5)])
@pytest.mark.parametrize("name", NETS)
def test_the_cascade_certifies_what_single_methods_certify(name, ball):
    """At least what any method does alone (classes may be shared out among several), at most what is true."""
    model, x, y = labelled(name, 8)
    single = set()
    for method in CASCADE:
        rows = certify(model, x, y, ball, method, attack_steps=5)
        single |= {row.index for row in rows if row.status is Status.certified}
    whole = certify(model, x, y, ball, "cascade", attack_steps=5)
    assert single <= {row.index for row in whole if row.status is Status.certified}
    assert all(list(row.stages)[:2] == ["clean", "attack"] for row in whole)
    assert [row.seconds for row in whole] == pytest.approx([sum(row.stages.values()) for row in whole])


def test_a_class_that_is_proven_stays_proven_and_is_not_asked_again(monkeypatch):
    asked = []

    def first(model, x, y, threat, classes, deadline):
        asked.append(classes.clone())
        found = torch.full(classes.shape, -1.0)
        found[:, 2:] = 1e-4
        return found

    def second(model, x, y, threat, classes, deadline):
        asked.append(classes.clone())
        return torch.full(classes.shape, 2e-4).where(classes, torch.tensor(7.0))  # what is not asked is not read

    monkeypatch.setitem(METHODS, "ibp", first)
    monkeypatch.setitem(METHODS, "crown", second)
    model, x, _ = labelled("mlp", 3)
    y = model(x).argmax(1)
    rows = certify(model, x, y, LinfBall(0.0), ["ibp", "crown"], **NONE)
    assert [row.status for row in rows] == [Status.certified] * 3 and {row.method for row in rows} <= {"ibp", "crown"}
    others = torch.ones(3, CLASSES, dtype=torch.bool).scatter(1, y[:, None], False)
    assert torch.equal(asked[0], others)
    left = others.clone()
    left[:, 2:] = False
    assert torch.equal(asked[1], left[left.any(1)])
    assert all(row.margin == pytest.approx(1e-4) for row in rows)


def complete(make):
    """A method that proves nothing and answers with the inputs that ``make(x, threat)`` gives."""
    return lambda model, x, y, threat, classes, deadline: Answer(
        torch.full(classes.shape, -torch.inf), make(model, x, y, threat)
    )


def adversarial(model, x, y, threat):
    from certifiers.attack import pgd

    return pgd(model, x, y, threat, steps=40, restarts=2)


def test_counterexamples_are_run_through_the_network(monkeypatch):
    model, x, y = labelled("mlp", 10)
    ball = LinfBall(0.03)
    broken = {row.index for row in certify(model, x, y, ball, "ibp") if row.status is Status.falsified}
    assert 0 < len(broken) < 10
    monkeypatch.setitem(METHODS, "finder", complete(adversarial))
    rows = certify(model, x, y, ball, ["ibp", "finder"], **NONE)
    assert {row.index for row in rows if row.status is Status.falsified} == broken
    assert {row.method for row in rows if row.status is Status.falsified} == {"finder"}
    # Clean inputs are no counterexamples, nor are points that only break it outside the ball, nor NaN.
    for useless in (
        lambda model, x, y, threat: x,
        lambda model, x, y, threat: torch.full_like(x, torch.nan),
    ):
        monkeypatch.setitem(METHODS, "finder", complete(useless))
        assert Status.falsified not in {row.status for row in certify(model, x, y, ball, "finder", **NONE)}
    monkeypatch.setitem(
        METHODS, "finder", complete(lambda model, x, y, threat: adversarial(model, x, y, LinfBall(0.9)))
    )
    for row in certify(model, x, y, LinfBall(1e-4), "finder", **NONE):
        assert row.status is Status.unknown
    far = adversarial(model, x, y, LinfBall(0.9))
    monkeypatch.setitem(METHODS, "finder", complete(lambda model, x, y, threat: far))
    monkeypatch.setattr(LinfBall, "project", lambda self, x, x_adv: x_adv)  # whatever the projection does
    for row in certify(model, x, y, LinfBall(1e-4), "finder", **NONE):
        assert row.status is Status.unknown


def test_a_counterexample_betrays_what_was_proven_before(monkeypatch, tmp_path):
    model, x, y = labelled("mlp", 10)

    def lying(model, x, y, threat, classes, deadline):
        found = torch.full(classes.shape, 0.002)
        found[torch.arange(len(x)), classes.int().argmax(1)] = -1.0  # one class stays open, so that all move on
        return found

    monkeypatch.setitem(METHODS, "ibp", lying)
    monkeypatch.setitem(METHODS, "finder", complete(adversarial))
    with Ledger(tmp_path / "a.jsonl", {}) as ledger, pytest.raises(SoundnessError, match="unsound"):
        certify(model, x, y, LinfBall(0.5), ["ibp", "finder"], ledger=ledger, **NONE)
    with pytest.raises(SoundnessError, match="contradicted"):
        read_ledger(tmp_path / "a.jsonl")


def slow(seconds):
    def method(model, x, y, threat, classes, deadline):
        time.sleep(seconds * len(x))
        return torch.full(classes.shape, -1.0)

    return method


def test_an_input_whose_time_is_used_up_is_a_timeout(monkeypatch):
    model, x, y = labelled("mlp", 3)
    monkeypatch.setitem(METHODS, "slow", slow(0.05))
    monkeypatch.setitem(METHODS, "never", lambda *_: pytest.fail("asked after the time was used up"))
    rows = certify(model, x, y, LinfBall(0.01), ["slow", "never"], input_seconds=0.04, **NONE)
    assert {(row.status, row.method) for row in rows} == {(Status.timeout, "slow")}
    assert all(row.seconds >= 0.05 and row.margin == -1.0 for row in rows)
    rows = certify(model, x, y, LinfBall(0.01), ["slow"], input_seconds=30, **NONE)
    assert {row.status for row in rows} == {Status.unknown}


def test_a_method_is_told_when_to_stop(monkeypatch):
    told = []

    def method(model, x, y, threat, classes, deadline):
        told.append((len(x), deadline and deadline - time.monotonic()))
        return torch.full(classes.shape, -1.0)

    monkeypatch.setitem(METHODS, "dear", method)
    monkeypatch.setitem(AT_ONCE, "dear", 2)
    model, x, y = labelled("mlp", 5)
    certify(model, x, y, LinfBall(0.01), "dear", **NONE)
    assert told == [(2, None), (2, None), (1, None)]
    told.clear()
    certify(model, x, y, LinfBall(0.01), "dear", input_seconds=100, **NONE)
    assert [round(left / n) for n, left in told] == [100, 100, 100]
    told.clear()
    certify(model, x, y, LinfBall(0.01), "dear", input_seconds=100, run_seconds=50, **NONE)
    assert all(left <= 50 for _, left in told)


def test_the_runs_time_leaves_a_ledger_that_goes_on(monkeypatch, tmp_path):
    model, x, y = labelled("mlp", 9)
    monkeypatch.setitem(METHODS, "slow", slow(0.05))
    path = tmp_path / "a.jsonl"
    with Ledger(path, {"eps": 0.01}) as ledger:
        part = certify(model, x, y, LinfBall(0.01), ["slow"], ledger=ledger, batch_size=3, run_seconds=0.25, **NONE)
    assert 3 <= len(part) < 9 and read_ledger(path)[1] == part
    assert [row.index for row in part] == list(range(len(part)))
    assert {row.status for row in part} == {Status.unknown}  # only what was asked to the end
    with Ledger(path, {"eps": 0.01}) as ledger:
        whole = certify(model, x, y, LinfBall(0.01), ["slow"], ledger=ledger, batch_size=3, **NONE)
    assert len(whole) == 9 and whole[: len(part)] == part


def picky(hard, seconds):
    """A method that certifies all but the `hard` images (by number), which take it this long each."""

    def method(model, x, y, threat, classes, deadline):
        logits = model(x)
        bounds = 0.5 * (logits.gather(1, y[:, None]) - logits)
        for row, image in enumerate(x):
            if round(image[0, 0, 0].item() * 100) in hard:
                time.sleep(seconds)
                bounds[row] = -1.0
        return bounds

    return method


def numbered(count):
    """Images that hold their number, their labels the network's own predictions but for that of number 1."""
    model, x, y = labelled("mlp", count)
    x[:, 0, 0, 0] = torch.arange(count) / 100
    y = model(x).argmax(1)
    y[1] = (y[1] + 1) % CLASSES
    return model, x, y


def test_the_end_of_the_time_chooses_no_image_by_its_outcome(monkeypatch, tmp_path):
    """Time ends within a batch, with the easy images behind the first undecided one decided: none of these counts."""
    model, x, y = numbered(20)
    monkeypatch.setitem(METHODS, "quick", picky(range(4, 20, 3), 0.0))
    monkeypatch.setitem(METHODS, "dear", picky(range(20), 0.15))
    monkeypatch.setitem(AT_ONCE, "dear", 1)
    ball, methods, path = LinfBall(0.01), ["quick", "dear"], tmp_path / "a.jsonl"
    ask = {"batch_size": 20, **NONE}
    whole = certify(model, x, y, ball, methods, **ask)
    assert {row.status.value for row in whole} == {"certified", "misclassified", "unknown"}
    with Ledger(path, {"eps": 0.01}) as ledger:
        part = certify(model, x, y, ball, methods, ledger=ledger, run_seconds=0.5, **ask)
    undecided = [row.index for row in part if row.status is Status.unknown]
    assert undecided and set(undecided) < {4, 7, 10, 13, 16, 19}  # those asked to the end, though time is over now
    nearest = undecided[-1] + 3
    assert [row.index for row in part] == list(range(nearest)) == [row.index for row in read_ledger(path)[1]]
    assert [row.status for row in part] == [row.status for row in whole[:nearest]]
    with Ledger(path, {"eps": 0.01}) as ledger:
        rest = certify(model, x, y, ball, methods, ledger=ledger, **ask)
    assert [row.status for row in rest] == [row.status for row in whole]


def test_time_that_ends_before_the_last_method_leaves_what_is_before_the_first_open_image(monkeypatch):
    model, x, y = numbered(12)
    monkeypatch.setitem(METHODS, "quick", picky([5, 9], 0.1))
    monkeypatch.setitem(METHODS, "never", lambda *_: pytest.fail("asked after the run's time"))
    part = certify(model, x, y, LinfBall(0.01), ["quick", "never"], batch_size=12, run_seconds=0.1, **NONE)
    assert [row.index for row in part] == [0, 1, 2, 3, 4]


def test_ledgers_of_old_have_no_stages(tmp_path):
    model, x, y = labelled("mlp", 3)
    path = tmp_path / "a.jsonl"
    with Ledger(path, {"eps": 0.01}) as ledger:
        new = certify(model, x, y, LinfBall(0.01), ledger=ledger)
    assert all(row.stages for row in read_ledger(path)[1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        del line["stages"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = read_ledger(path)[1]
    assert old == new and all(row.stages == {} for row in old)
    lines[1].pop("seconds")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="Line 2"):
        read_ledger(path)


@pytest.mark.parametrize("name", ["input_seconds", "run_seconds"])
def test_limits_must_be_positive(name):
    model, x, y = labelled("mlp", 2)
    with pytest.raises(InputError, match=name):
        certify(model, x, y, LinfBall(0.01), **{name: 0.0})


def test_with_time_the_cascade_is_complete():
    """Every input of a small network is decided, as the exact method alone decides it, and never against an attack."""
    model, x, y = labelled("mlp", 8)
    ball = LinfBall(0.03)
    whole = certify(model, x, y, ball, "cascade", input_seconds=20, **NONE)
    alone = certify(model, x, y, ball, "exact", **NONE)
    assert {row.status for row in whole} == {Status.certified, Status.falsified}
    assert [row.status for row in whole] == [row.status for row in alone]
    assert "exact" in {row.method for row in whole}


def test_max_pooling_leaves_the_exact_method_without_an_answer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(18, 10)).eval()
    x, _ = images(2)
    with pytest.warns(UserWarning, match="exact leaves all undecided"):
        rows = certify(model, x, model(x).argmax(1), LinfBall(1e-3), "exact", **NONE)
    assert {(row.status, row.margin) for row in rows} == {(Status.unknown, None)}


def test_names_of_methods():
    assert method_names("cascade", limited=True) == (*CASCADE, "exact")
    assert method_names("cascade") == CASCADE
    assert method_names(["ibp", "cascade", "symbolic"]) == (*CASCADE, "symbolic")


# ---- AutoAttack


def test_without_its_package_the_error_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def no_package(name, *args, **kwargs):
        if name == "pyautoattack":
            raise ImportError("no such package")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_package)
    model, x, y = labelled("mlp", 2)
    with pytest.raises(InputError, match=r"pip install 'certprune\[attacks\]'"):
        certify(model, x, y, LinfBall(0.1), "autoattack", **NONE)


@pytest.mark.slow
@pytest.mark.parametrize("ball, count", [(LinfBall(0.15), 6), (L2Ball(1.0), 1)])
def test_autoattack_finds_what_pgd_finds(ball, count):
    pytest.importorskip("pyautoattack")
    model, x, y = labelled("mlp", count)
    before = torch.get_rng_state()
    ours = [row.status for row in certify(model, x, y, ball, "ibp")]
    rows = certify(model, x, y, ball, "autoattack", **NONE)
    assert torch.equal(torch.get_rng_state(), before)
    for row, own in zip(rows, ours, strict=True):
        assert row.status in ((Status.falsified,) if own is Status.falsified else (Status.falsified, Status.unknown))
