"""Every kind of ledger: cut at any byte, killed, and shared out in two, it ends with the rows of one whole run."""

import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from certifiers.certification import certify
from certifiers.errors import InputError, SoundnessError
from certifiers.fingerprint import model_hash
from certifiers.ledger import ledger_kind
from certifiers.merging import KINDS, TIMES, merge_ledgers
from certifiers.radius import RadiusLedger, certify_radii
from certifiers.smoothing import SmoothedClassifier, SmoothedLedger, Stopping, certify_smoothed, smoothing_header
from certifiers.threat import LinfBall
from certifiers.verdict import UNDECIDED, Ledger, Status, Verdict, read_ledger
from certprune.certifying import images_digest
from certprune.data import Split, load_data
from certprune.data.images import ByteImages, FileImages, View
from certprune.external import external_network
from certprune.runs import open_run
from tests.commands import ONE_EPOCH, VARIANT, copied_run, ended, ledger_path, smoke_run
from tests.nets import CLASSES, images, tiny_conv

MODEL, (X, _) = tiny_conv(), images(10)
Y = MODEL(X).argmax(1)
Y[:2] = (Y[:2] + 1) % CLASSES  # two are predicted wrong
ABOUT = {"model": model_hash(MODEL), "data": "made up", "split": "test"}
HALF = 'import re, sys\nindex = re.search(r"input (\\d+)", open(sys.argv[2]).read())\n'
HALF += 'print("unsat" if int(index[1]) % 2 else "unknown")\n'


def cascade(path, numbers, pause=0.0):
    methods = ("ibp", "crown", "alpha-crown")
    header = {**ABOUT, "eps": 0.03, "norm": "linf", "method": "+".join(methods)}
    settings = {"batch_size": 2, "indices": numbers, "attack_steps": 5, "on_batch": lambda *_: time.sleep(pause)}
    with Ledger(path, header) as ledger:
        certify(MODEL, X[numbers], Y[numbers], LinfBall(0.03), methods, ledger=ledger, **settings)


def radius(path, numbers, pause=0.0):
    sizes = {"largest": 0.1, "tolerance": 0.01}
    header = {**ABOUT, "norm": "linf", "method": "ibp+crown", **sizes}
    settings = {"batch_size": 2, "indices": numbers, "attack_steps": 3, "on_batch": lambda *_: time.sleep(pause)}
    with RadiusLedger(path, header) as ledger:
        certify_radii(MODEL, X[numbers], Y[numbers], method=("ibp", "crown"), ledger=ledger, **sizes, **settings)


def smoothing(path, numbers, pause=0.0, stopping=None):
    classifier = SmoothedClassifier(MODEL, CLASSES, 0.25)
    counts = {"n0": 10, "n": 2000 if stopping else 100, "alpha": 0.01, "seed": 0}
    header = {**ABOUT, "sigma": 0.25, **counts, **smoothing_header(classifier, stopping, X)}
    settings = {"indices": numbers, "stopping": stopping, "on_input": lambda *_: time.sleep(pause)}
    with SmoothedLedger(path, header) as ledger:
        certify_smoothed(classifier, X[numbers], Y[numbers], ledger=ledger, **counts, **settings)


def anytime(path, numbers, pause=0.0):
    smoothing(path, numbers, pause, Stopping(tolerance=0.1, up_to=0.3))


LIBRARY = {maker.__name__: maker for maker in (cascade, radius, smoothing, anytime)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that intervals and a weak attack leave images of undecided."""
    weak = (
        "pretrain.epochs=2",
        "certify.methods=[ibp]",
        "certify.attack_steps=1",
        "certify.eps=[0.05]",
        "certify.count=30",
    )
    return smoke_run(tmp_path_factory.mktemp("finished") / "smoke", *ONE_EPOCH, *weak)


def external(finished, folder):
    """Another verifier's ledger: a program that says unsat of every second image."""
    run = open_run(copied_run(finished, folder / "smoke"))
    data = load_data("digits", seed=0, validation=0.1)
    (folder / "half.py").write_text(HALF)
    command = f"{shlex.join([sys.executable, str(folder / 'half.py')])} {{onnx}} {{vnnlib}}"
    base = ledger_path(run.folder, "eps-0.05")

    def make(path, numbers, pause=0.0):
        images = range(numbers[0], numbers[-1] + 1)
        assert external_network(run, VARIANT, base, data, command, 10, indices=images)[0] == path

    open_ = sum(row.status in UNDECIDED for row in read_ledger(base)[1])
    assert open_ > 1
    path = base.with_name("eps-0.05-external-half-10s.jsonl")
    return Kind(make, path, range(30), (b'"method": "external:half"', open_, (0,)))


class Kind(NamedTuple):
    """``make(path, numbers, pause)`` writes, or goes on with, a kind's ledger of these images."""

    make: Callable
    path: Path
    numbers: range
    steps: tuple = ()  # what to count in the file to see how far it is, of how many, and when to kill; rows if empty


@pytest.fixture(params=[*LIBRARY, "external"])
def kind(request, tmp_path):
    if request.param == "external":
        return external(request.getfixturevalue("finished"), tmp_path)
    return Kind(LIBRARY[request.param], tmp_path / "ledger.jsonl", range(10))


def lasting(path):
    """The header and the rows by index, without what differs from run to run."""
    header, rows = KINDS[ledger_kind(path)].read(path)
    bare = [replace(row, **{key: value for key, value in TIMES.items() if hasattr(row, key)}) for row in rows]
    return header, sorted(bare, key=lambda row: row.index)


def whole(kind):
    """The bytes of a run that nothing cut off, and what it found."""
    kind.make(kind.path, kind.numbers)
    return kind.path.read_bytes(), lasting(kind.path)


def test_cut_at_every_byte_of_the_last_row(kind):
    content, (header, rows) = whole(kind)
    assert len(rows) == len(kind.numbers) and len({row.status for row in rows}) > 1
    begin = content.rindex(b"\n", 0, -1) + 1
    reader = KINDS[header.get("kind")]
    for length in range(begin, len(content)):
        kind.path.write_bytes(content[:length])
        with reader(kind.path, header) as ledger:
            assert len(ledger.verdicts) == len(rows) - 1
        assert kind.path.read_bytes() == content[:begin]  # the cut line is gone
    for length in (begin, (begin + len(content)) // 2, len(content) - 1):  # without the newline it is cut short too
        kind.path.write_bytes(content[:length])
        kind.make(kind.path, kind.numbers)
        assert kind.path.read_bytes()[:begin] == content[:begin]
        assert lasting(kind.path) == (header, rows)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_killed_between_rows(kind):
    expected = whole(kind)[1]
    mark, count, moments = kind.steps or (b"\n", 1 + len(kind.numbers), (1, 5))
    for kept in moments:
        kind.path.unlink()
        process = multiprocessing.get_context("fork").Process(target=kind.make, args=(kind.path, kind.numbers, 0.05))
        process.start()
        deadline = time.monotonic() + 30
        while process.is_alive() and time.monotonic() < deadline:
            if kind.path.exists() and kind.path.read_bytes().count(mark) > kept:
                break
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        before = kind.path.read_bytes()
        assert kept < before.count(mark) < count
        if kind.steps:  # the rows that are still open stand there too, and give way later
            assert len(lasting(kind.path)[1]) == len(kind.numbers)
        done = [line for line in before[: before.rindex(b"\n") + 1].splitlines() if not kind.steps or mark in line]
        kind.make(kind.path, kind.numbers)
        after = kind.path.read_bytes()
        assert [line for line in after.splitlines() if line in done] == done  # nothing was done anew
        assert kind.steps or after.startswith(b"\n".join(done) + b"\n")
        assert lasting(kind.path) == expected


def test_two_shards_merge_to_what_one_run_gives(kind, tmp_path):
    expected, shards = whole(kind)[1], []
    for name, numbers in (("b", kind.numbers[4:]), ("a", kind.numbers[:6])):  # they overlap in two images
        kind.path.unlink(missing_ok=True)
        kind.make(kind.path, numbers)
        shards.append(kind.path.rename(tmp_path / f"{name}.jsonl"))
    merged = tmp_path / "merged.jsonl"
    rows = merge_ledgers(shards, merged)
    assert [row.index for row in rows] == list(kind.numbers)
    assert lasting(merged) == expected
    os.replace(merged, kind.path)
    before = kind.path.read_bytes()
    kind.make(kind.path, kind.numbers)  # which goes on with it, and finds nothing left to do
    assert kind.path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_a_ledger_of_other_images_is_refused_and_one_of_old_is_gone_on_with(tmp_path, kind):
    path, about = tmp_path / "a", {"model": "m", "data": "digits", "split": "test"}
    for first, later in (({}, {"images": "1a"}), ({"images": "1a"}, {}), ({"images": "1a"}, {"images": "1a"})):
        path.unlink(missing_ok=True)
        for more in (first, later):
            with kind(path, about | more) as ledger:
                assert ledger.header.get("images") == first.get("images")
    before = path.read_bytes()
    with pytest.raises(InputError, match="digits test images is 1a, but .* now is 2b.*Ask with the run"):
        kind(path, about | {"images": "2b"})
    assert path.read_bytes() == before


def test_the_digest_of_images_tells_splits_apart_and_reads_no_files():
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    splits = [Split(x, y), Split(x, y.flip(0) + 1), Split(x[:4], y[:4]), Split(1 - x, y)]
    splits.append(Split(ByteImages((255 * x).byte()), y))
    files = [Path(f"missing{place}.png") for place in range(5)]
    splits += [Split(FileImages(files, View(2)), labels) for labels in (y, y.flip(0) + 1)]
    digests = [images_digest(split) for split in splits]
    assert len(set(digests)) == len(splits)
    assert digests == [images_digest(Split(split.x, split.y.clone().int())) for split in splits]


# ---- merging


def shard(path, statuses, start=0, **header):
    header = {"model": "m", "data": "d", "split": "test", "eps": 0.1, "norm": "linf", "method": "ibp", **header}
    rows = [
        Verdict(i, 1, int(status != "misclassified"), Status(status), 0.1, "linf", "ibp", None, 0.1)
        for i, status in enumerate(statuses, start)
    ]
    with Ledger(path, header) as ledger:
        ledger.append(rows)
    return path


def test_shards_of_other_images_are_not_merged_even_behind_one_of_old(tmp_path):
    about = {"model": "m", "eps": 0.1, "norm": "linf"}
    headers = [about, {**about, "images": "1a"}, {**about, "images": "2b"}]
    paths = [tmp_path / f"{place}.jsonl" for place in range(3)]
    for place, (path, header) in enumerate(zip(paths, headers, strict=True)):
        with Ledger(path, header) as ledger:
            ledger.append([Verdict(place, 0, 1, Status.misclassified, 0.1, "linf", "clean", None, 0.1)])
    assert [row.index for row in merge_ledgers(paths[:2], tmp_path / "old.jsonl")] == [0, 1]
    assert "images" not in read_ledger(tmp_path / "old.jsonl")[0]  # not known of all rows
    with pytest.raises(InputError, match="images is '1a' .* '2b'"):
        merge_ledgers(paths, tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()


def test_merge_on_the_command_line(cli, tmp_path):
    paths = [shard(tmp_path / "a", ["certified", "unknown"], 2), shard(tmp_path / "b", ["falsified"] * 2)]
    assert cli("merge", *paths, "-o", "c.jsonl") == 0 and "4 images of 2 ledgers" in cli.out
    assert [row.status.value for row in read_ledger("c.jsonl")[1]] == ["falsified"] * 2 + ["certified", "unknown"]
    cli.refuses("merge", *paths, "-o", "c.jsonl", saying=["c.jsonl exists already"])
    cli.refuses("merge", paths[0], paths[0], "-o", "d.jsonl", saying=["two different ledgers"])
    broken = shard(tmp_path / "e", ["falsified"], 2)
    assert ended("merge", paths[0], broken, "-o", "d.jsonl") == 3  # a contradiction
    assert not (tmp_path / "d.jsonl").exists()


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"eps": 0.2}, {"split": "train"}, {"images": "2b"}, {"method": "crown"}]
)
def test_only_shards_of_one_certification_are_merged(tmp_path, change):
    one = shard(tmp_path / "a", ["certified"], images="1a")
    other = shard(tmp_path / "b", [], 1, **{"images": "1a", **change})
    with pytest.raises(InputError, match=f"their {next(iter(change))} is"):
        merge_ledgers([one, other], tmp_path / "c")
    with RadiusLedger(tmp_path / "r", {"model": "m"}), pytest.raises(InputError, match="kind radius"):
        merge_ledgers([one, tmp_path / "r"], tmp_path / "c")


def test_shards_that_disagree_are_refused(tmp_path):
    one = shard(tmp_path / "a", ["certified", "certified"])
    with pytest.raises(InputError, match="Input 1 is certified in .*a, but unknown in .*b"):
        merge_ledgers([one, shard(tmp_path / "b", ["unknown"], 1)], tmp_path / "c")
    with pytest.raises(SoundnessError, match="Input 1 is certified in .*a, but misclassified"):
        merge_ledgers([one, shard(tmp_path / "d", ["misclassified"], 1)], tmp_path / "c")
    tainted = shard(tmp_path / "t", [], 5)
    tainted.write_text(tainted.read_text() + json.dumps({"contradiction": {"index": 7}}) + "\n")
    with pytest.raises(SoundnessError, match="contradicted"):
        merge_ledgers([one, tainted], tmp_path / "c")
    assert not (tmp_path / "c").exists()
