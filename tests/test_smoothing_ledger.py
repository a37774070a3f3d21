"""The ledger of smoothed verdicts: what is written, cut off, killed, gone on with, refused; and what it sums up to."""

import json
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch

from certifiers.errors import InputError
from certifiers.smoothing import (
    SmoothedClassifier,
    SmoothedLedger,
    SmoothedVerdict,
    certified_accuracy,
    certify_smoothed,
    read_smoothed_ledger,
)
from certifiers.verdict import Ledger, Status, model_hash, read_ledger
from tests.nets import CLASSES, HalfSpace, images, tiny_conv

HEADER = {"model": "m", "data": "d", "split": "test", "norm": "l2", "sigma": 0.25, "n0": 100, "n": 1000}
HEADER |= {"alpha": 0.001, "seed": 0}


def verdicts_of(model, x, y, path, on_input=None, **changes):
    header = {**HEADER, "model": model_hash(model), "n0": 10, "n": 60, **changes}
    with SmoothedLedger(path, header) as ledger:
        settings = {key: header[key] for key in ("n0", "n", "alpha", "seed")}
        return certify_smoothed(
            SmoothedClassifier(model, CLASSES, header["sigma"]), x, y, ledger=ledger, on_input=on_input, **settings
        )


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
    assert lines[0] | {"model": "m"} == {"ledger": 1, "kind": "smoothing", **HEADER, "n0": 10, "n": 60}
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
