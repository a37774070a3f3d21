"""The ledger of smoothed verdicts: what is written, cut off, killed, gone on with, refused; and what it sums up to."""

import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from certifiers.errors import InputError
from certifiers.merging import merge_ledgers
from certifiers.smoothing import (
    SmoothedClassifier,
    SmoothedLedger,
    SmoothedVerdict,
    Stopping,
    certified_accuracy,
    certified_radius,
    certify_smoothed,
    read_smoothed_ledger,
    smoothing_header,
)
from certifiers.smoothing.anytime import lower_sequence
from certifiers.smoothing.bounds import lower_confidence_bounds
from certifiers.verdict import Ledger, Status, model_hash, read_ledger
from tests.nets import CLASSES, HalfSpace, images, tiny_conv

HEADER = {"model": "m", "data": "d", "split": "test", "norm": "l2", "sigma": 0.25, "n0": 100, "n": 1000}
HEADER |= {"alpha": 0.001, "seed": 0}
SLACK = 8 * 2.0**-21  # of 64 pixels at sigma 0.25


def verdicts_of(model, x, y, path, on_input=None, **changes):
    header = {**HEADER, "model": model_hash(model), "n0": 10, "n": 60, **changes}
    classifier = SmoothedClassifier(model, CLASSES, header["sigma"])
    with SmoothedLedger(path, {**smoothing_header(classifier, None, x), **header}) as ledger:
        settings = {key: header[key] for key in ("n0", "n", "alpha", "seed")}
        return certify_smoothed(classifier, x, y, ledger=ledger, on_input=on_input, **settings)


def timeless(verdicts):
    return [{**vars(verdict), "seconds": 0} for verdict in verdicts]


def test_statuses(tmp_path):
    model = HalfSpace()
    x, y = model.at([0.4, 0.4, 0.0, -0.4]).clamp(0, 1), torch.tensor([1, 0, 1, 0])
    found = certify_smoothed(SmoothedClassifier(model, 2, 0.25), x, y, n=200, indices=[5, 6, 7, 8])
    assert [v.status.value for v in found] == ["certified", "misclassified", "abstained", "certified"]
    assert [v.index for v in found] == [5, 6, 7, 8] and [v.prediction for v in found] == [1, 1, None, 0]
    assert found[2].radius == 0.0 and found[0].radius > 0 and found[1].radius > 0  # it is constant there, but wrong
    with pytest.raises(InputError, match="Labels"):
        certify_smoothed(SmoothedClassifier(model, 2, 0.25), x, torch.tensor([1, 0, 2, 0]))
    with pytest.raises(InputError, match="different numbers"):
        certify_smoothed(SmoothedClassifier(model, 2, 0.25), x, y, indices=[1, 1, 2, 3])


def test_verdicts_come_back_from_the_ledger_as_they_went_in(tmp_path):
    path, (x, y) = tmp_path / "a" / "smoothing-0.25.jsonl", images(4)
    found = verdicts_of(tiny_conv(), x, y, path)
    header, again = read_smoothed_ledger(path)
    assert again == found and header["kind"] == "smoothing" and header["sigma"] == 0.25
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] | {"model": "m"} == {"ledger": 1, "kind": "smoothing", **HEADER, "n0": 10, "n": 60, "slack": SLACK}
    assert set(lines[1]) == {
        "index", "label", "prediction", "status", "radius", "counts", "selection", "seconds", "samples"
    }  # fmt: skip
    assert (
        all(isinstance(count, int) for count in lines[1]["counts"])
        and sum(lines[1]["counts"]) == lines[1]["samples"] == 60
    )


def test_a_cut_off_certification_goes_on_to_the_same_rows(tmp_path):
    x, y = images(8)
    model = tiny_conv()
    whole = verdicts_of(model, x, y, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"

    def stop(done, count):
        assert count == 8
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verdicts_of(model, x, y, path, stop)
    assert timeless(read_smoothed_ledger(path)[1]) == timeless(whole[:3])
    with path.open("ab") as file:
        file.write(b'{"index": 3, "label"')  # a kill in the middle of a line
    seen = []
    resumed = verdicts_of(model, x, y, path, lambda done, count: seen.append(done))
    assert seen == [4, 5, 6, 7, 8] and timeless(resumed) == timeless(whole)
    assert timeless(read_smoothed_ledger(path)[1]) == timeless(whole)
    seen.clear()
    assert timeless(verdicts_of(model, x, y, path, lambda *place: seen.append(place))) == timeless(whole)
    assert seen == []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_certification_loses_and_doubles_nothing(tmp_path):
    path, (x, y) = tmp_path / "a.jsonl", images(60)
    model = tiny_conv()
    for done in (5, 20):
        process = multiprocessing.get_context("fork").Process(target=verdicts_of, args=(model, x, y, path))
        process.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") <= done):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert [v.index for v in read_smoothed_ledger(path)[1]][:done] == list(range(done))
    verdicts_of(model, x, y, path)
    found = read_smoothed_ledger(path)[1]
    assert [v.index for v in found] == list(range(60))
    assert timeless(found) == timeless(certify_smoothed(SmoothedClassifier(model, CLASSES, 0.25), x, y, n0=10, n=60))


@pytest.mark.parametrize(
    "change",
    [{"sigma": 0.5}, {"n": 61}, {"n0": 11}, {"alpha": 0.01}, {"seed": 1}, {"data": "e"}, {"split": "train"}],
    ids=lambda change: next(iter(change)),
)
def test_a_ledger_of_other_settings_is_refused(tmp_path, change):
    path, (x, y) = tmp_path / "a.jsonl", images(2)
    verdicts_of(tiny_conv(), x, y, path)
    content = path.read_bytes()
    with pytest.raises(InputError, match=f"another {next(iter(change))}"):
        verdicts_of(tiny_conv(), x, y, path, **change)
    assert path.read_bytes() == content


def test_what_is_asked_must_be_what_the_ledger_is_about(tmp_path):
    path, (x, y) = tmp_path / "a.jsonl", images(2)
    verdicts_of(tiny_conv(), x, y, path)
    classifier = SmoothedClassifier(tiny_conv(), CLASSES, 0.25)
    header = read_smoothed_ledger(path)[0]
    with SmoothedLedger(path, header) as ledger:
        for settings, saying in (({"n": 61, "n0": 10}, "for n 60"), ({"n": 60, "n0": 10, "seed": 4}, "for seed 0")):
            with pytest.raises(InputError, match=saying):
                certify_smoothed(classifier, x, y, ledger=ledger, **settings)
        with pytest.raises(InputError, match="other data"):
            certify_smoothed(classifier, x, (y + 1) % 10, n0=10, n=60, ledger=ledger)
        other = SmoothedClassifier(tiny_conv(seed=1), CLASSES, 0.25)
        with pytest.raises(InputError, match="is for model"):
            certify_smoothed(other, x, y, n0=10, n=60, ledger=ledger)
        with pytest.raises(InputError, match="has a verdict already"):
            ledger.append(ledger.verdicts[:1])


def test_the_two_kinds_of_ledgers_are_told_apart(tmp_path):
    smoothed, plain = tmp_path / "smoothed.jsonl", tmp_path / "plain.jsonl"
    verdicts_of(tiny_conv(), *images(1), smoothed)
    with Ledger(plain, {"model": "m", "eps": 0.1, "norm": "linf"}):
        assert "kind" not in json.loads(plain.read_text())  # as ledgers were before there were kinds
    with pytest.raises(InputError, match="kind smoothing, but verdicts against a threat set"):
        read_ledger(smoothed)
    with pytest.raises(InputError, match="threat set, but verdicts of the kind smoothing"):
        read_smoothed_ledger(plain)
    content = smoothed.read_bytes()
    with pytest.raises(InputError, match="kind smoothing"):
        Ledger(smoothed, {"model": "m"})
    assert smoothed.read_bytes() == content
    smoothed.write_bytes(content.replace(b'"counts"', b'"count"'))
    with pytest.raises(InputError, match="Line 2 .*no verdict.*counts"):
        read_smoothed_ledger(smoothed)


def most(n, alpha, sigma):
    """The radius that n samples of one class prove: sigma Phi^-1(alpha^(1/n))."""
    return sigma * float(torch.special.ndtri(torch.tensor(alpha ** (1 / n), dtype=torch.float64)))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"radius": 9.0}, "radius 9.0, but from its counts follows 0.6"),
        ({"counts": [500, 500]}, "but from its counts follows 0.0"),
        ({"counts": [0, 1001]}, "sum up to 1001, more than its 1000 samples"),
        ({"counts": [1, -1]}, "its counts are"),
        ({"samples": 900}, "of 900 samples, the ledger of 1000"),
        ({"selection": [51, 49]}, "prediction is 1, which is not what won most"),
        ({"selection": [0, 101]}, "more than n0, 100"),
        ({"prediction": 0}, "certified with prediction 0 and label 1"),
        ({"prediction": 7, "label": 7}, "prediction is 7"),
        ({"status": "abstained", "prediction": None, "radius": 0.0}, "the radius 0.0, but from"),
        ({"radius": 0.0, "counts": [500, 500]}, "certified with the radius 0.0"),
    ],
)
@pytest.mark.parametrize("kind", ["fixed", "early"])
def test_rows_that_do_not_follow_from_their_counts_are_not_read(tmp_path, change, says, kind):
    """What n samples of one class prove is known in closed form; a row that claims more, or other, is refused."""
    path, header = tmp_path / "s.jsonl", HEADER
    if kind == "early":
        header = {**header, "stopping": Stopping(tolerance=0.1).header()}
        if "samples" in change:
            change, says = {"samples": 1001}, "of 1001 samples, the ledger of 1000"
    radius = most(1000, 0.001, 0.25)
    if kind == "early":  # less, since the betting bound holds at all times at once
        radius, above = certified_radius(float(lower_sequence(1000, 1000, 0.001)), 0.25), radius
        assert 0.9 * above < radius < above
    row = SmoothedVerdict(0, 1, 1, Status.certified, radius, (0, 1000), (10, 90), 0.1, 1000)
    with SmoothedLedger(path, header) as ledger:
        ledger.append([row])
    with path.open("a") as file:
        file.write(json.dumps({**vars(row), "index": 1, **change}) + "\n")
    with pytest.raises(InputError, match=f"Line 3 .*cannot be true: .*{says}"):
        read_smoothed_ledger(path)


def test_rows_prove_their_counts_less_the_slack_of_the_header(tmp_path):
    whole = most(1000, 0.001, 0.25)
    for name, header, right, wrong in (
        ("now", {**HEADER, "slack": SLACK}, whole - SLACK, whole),
        ("before", HEADER, whole, whole - SLACK),  # a ledger from before there was a grid reads as it did
    ):
        row = SmoothedVerdict(0, 1, 1, Status.certified, right, (0, 1000), (10, 90), 0.1, 1000)
        path = tmp_path / f"{name}.jsonl"
        with SmoothedLedger(path, header) as ledger:
            ledger.append([row])
            with pytest.raises(InputError, match="input 1 cannot go .*from its counts"):
                ledger.append([replace(row, index=1, radius=wrong)])
        assert read_smoothed_ledger(path)[1] == [row]
    less = {**HEADER, "slack": whole + 0.1}  # more than there is: nothing is certified
    none = SmoothedVerdict(0, 1, None, Status.abstained, 0.0, (0, 1000), (10, 90), 0.1, 1000)
    assert list(SmoothedLedger.flaws(less, [none])) == []


@pytest.mark.parametrize("slack", [None, 2 * SLACK], ids=["none", "another"])
def test_ledgers_of_another_grid_are_read_but_not_gone_on_with(tmp_path, slack):
    path, (x, y) = tmp_path / "a.jsonl", images(2)
    header = {**HEADER, "model": model_hash(tiny_conv()), "n0": 10, "n": 60} | ({"slack": slack} if slack else {})
    classifier, says = SmoothedClassifier(tiny_conv(), CLASSES, 0.25), f"for slack {slack}, but {SLACK} is to be"
    with SmoothedLedger(path, header) as ledger, pytest.raises(InputError, match=says):
        certify_smoothed(classifier, x, y, n0=10, n=60, ledger=ledger)
    content = path.read_bytes()
    with pytest.raises(InputError, match=f"another slack: {slack} there, {SLACK} now"):
        verdicts_of(tiny_conv(), x, y, path)
    assert path.read_bytes() == content and read_smoothed_ledger(path)[1] == []
    verdicts_of(tiny_conv(), x, y, tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="different certifications: their slack"):
        merge_ledgers([path, tmp_path / "b.jsonl"], tmp_path / "both.jsonl")


def test_a_selection_that_ties_may_have_chosen_either_class(tmp_path):
    with SmoothedLedger(tmp_path / "s.jsonl", HEADER) as ledger:
        rows = [SmoothedVerdict(0, 1, 1, Status.certified, most(1000, 0.001, 0.25), (0, 1000), (50, 50), 0.1, 1000)]
        rows.append(SmoothedVerdict(1, 1, None, Status.abstained, 0.0, (0, 1000), (50, 50), 0.1, None))
        ledger.append(rows)
        with pytest.raises(InputError, match="input 2 cannot go .*from its counts"):
            ledger.append([SmoothedVerdict(2, 1, None, Status.abstained, 0.0, (0, 1000), (49, 51), 0.1, 1000)])
    assert read_smoothed_ledger(tmp_path / "s.jsonl")[1] == rows


@pytest.mark.parametrize("stopping", [None, Stopping(tolerance=0.1)])
def test_ten_thousand_rows_are_looked_through_in_a_moment(stopping):
    header = {**HEADER, "n": 100_000, **({} if stopping is None else {"stopping": stopping.header()})}
    won = list(range(90_000, 100_000))
    bound = lower_confidence_bounds if stopping is None else lower_sequence
    lower = bound(won, 100_000, 0.001)
    rows = [
        SmoothedVerdict(i, 1, 1, Status.certified, certified_radius(float(p), 0.25), (0, k), (0, 100), 0.1, 100_000)
        for i, (k, p) in enumerate(zip(won, lower, strict=True))
    ]
    begin = time.process_time()
    assert list(SmoothedLedger.flaws(header, rows)) == []
    assert time.process_time() - begin < 5
    swapped = [rows[0], replace(rows[1], radius=rows[9].radius)]
    assert [place for place, _ in SmoothedLedger.flaws(header, swapped)] == [1]


def test_certified_accuracy_by_hand():
    def verdict(index, status, radius):
        prediction = {Status.certified: 1, Status.misclassified: 0, Status.abstained: None}[status]
        return SmoothedVerdict(index, 1, prediction, status, radius, (), (), 0.0)

    good, wrong, none = Status.certified, Status.misclassified, Status.abstained
    rows = [verdict(0, good, 0.3), verdict(1, good, 0.5), verdict(2, wrong, 0.9), verdict(3, none, 0.0)]
    found = {radius: certified_accuracy(rows, radius).count for radius in (0, 0.25, 0.3, 0.31, 0.5, 0.51, 9.0)}
    assert found == {0: 2, 0.25: 2, 0.3: 2, 0.31: 1, 0.5: 1, 0.51: 0, 9.0: 0}
    assert certified_accuracy(rows, 0.0).value == 0.5
    for radius in (-0.1, math.nan):
        with pytest.raises(InputError, match="radius"):
            certified_accuracy(rows, radius)
    with pytest.raises(InputError, match="at least one verdict"):
        certified_accuracy([], 0.5)
