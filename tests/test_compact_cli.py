"""``compact``, and ``certify`` and ``export`` of what it writes, on a small run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

import certprune
from certifiers.fingerprint import model_hash
from certifiers.radius import read_radius_ledger
from certifiers.verdict import Status, read_ledger
from certprune.compact import compact, read_compacted, write_compacted
from certprune.data import load_data
from certprune.reports import read_run
from certprune.runs import open_run
from tests.commands import ONE_EPOCH, VARIANT, ledger_path, smoke_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke_run(tmp_path_factory.mktemp("finished") / "smoke", *ONE_EPOCH, "certify.count=40")


@pytest.fixture
def small(cli, work):
    assert cli("compact", work, VARIANT, "-o", "small.safetensors") == 0
    return Path("small.safetensors")


def test_compact_writes_a_smaller_network_of_the_same_outputs(cli, work):
    assert cli("compact", work, VARIANT) == 0
    assert "multiply-adds" in cli.out and "compacted.safetensors" in cli.out
    path = work / VARIANT / "compacted.safetensors"
    whole, small = open_run(work).load_model(VARIANT), certprune.load(path)
    x = load_data("digits", seed=0, validation=0.1).test.x
    assert torch.allclose(small(x), whole(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    found = read_compacted(path)
    assert found.origin["variant"] == VARIANT and found.origin["model"] == model_hash(whole)
    assert found.origin["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert cli("compact", work, VARIANT, "-o", "a.safetensors.gz", "--method", "ibp") == 0
    assert Path("a.safetensors.gz").stat().st_size < path.stat().st_size
    assert read_run(work).missing == []  # the file does not disturb the reports


def test_certify_decides_a_compacted_network_like_the_other(cli, work, small):
    assert cli("certify", work, "--network", small, "--eps", "0.02") == 0
    header, found = read_ledger("small-certificates/eps-0.02.jsonl")
    _, others = read_ledger(ledger_path(work, "eps-0.02"))
    assert [v.index for v in found] == [v.index for v in others] == list(range(40))
    both = zip(found, others, strict=True)
    same = sum((a.status is Status.certified) == (b.status is Status.certified) for a, b in both)
    assert same >= 39 and header["model"] == model_hash(certprune.load(small)) and header["variant"] == "small"
    before = Path("small-certificates/eps-0.02.jsonl").read_bytes()
    assert cli("certify", work, "--network", small, "--eps", "0.02") == 0  # nothing is left to do
    assert Path("small-certificates/eps-0.02.jsonl").read_bytes() == before
    assert cli("certify", work, "--network", small, "--radius", "--eps", "0.05", "--count", "3") == 0
    (radii,) = Path("small-certificates").glob("radius-*.jsonl")
    assert len(read_radius_ledger(radii)[1]) == 3


def test_export_writes_a_compacted_network(cli, work, small):
    assert cli("export", work, "bench", "--network", small, "--eps", "0.02", "--count", "4") == 0
    lines = list(csv.reader(Path("bench/instances.csv").read_text().splitlines()))
    assert lines and {line[0] for line in lines} == {"onnx/small.onnx"}
    assert cli("verify", *(Path("bench") / name for name in lines[0][:2]), "--timeout", "20") == 0
    assert cli.out.split()[0] in ("sat", "unsat")


def other_split(work):
    """The same networks in a run of another seed: its test split is another one, of the same name."""
    other = Path(shutil.copytree(work, "other"))
    config = other / "config.yaml"
    assert "\nseed: 0\n" in config.read_text()
    config.write_text(config.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
    return other


def test_a_ledger_holds_no_images_of_another_split(cli, work, small):
    other, asked = other_split(work), ("--network", small, "--eps", "0.02")
    for more in ((), ("--radius",)):
        assert cli("certify", work, *asked, *more, "--index", "0:10") == 0
        for images in ("0:10", "10:20"):
            words = ["other images", "Ask with the run, or the seed"]
            cli.refuses("certify", other, *asked, *more, "--index", images, saying=words)
    first, second = (read_ledger("small-certificates/eps-0.02.jsonl")[0], read_ledger(ledger_path(work, "eps-0.02"))[0])
    assert first["images"] == second["images"]


def test_a_ledger_of_old_is_told_by_its_labels(cli, work, small):
    other, asked = other_split(work), ("--network", small, "--eps", "0.02")
    for more in ((), ("--radius",)):
        assert cli("certify", work, *asked, *more, "--index", "0:10") == 0
    for path in Path("small-certificates").glob("*.jsonl"):
        header, *rows = path.read_text().splitlines(keepends=True)
        old = {key: value for key, value in json.loads(header).items() if key != "images"}
        path.write_text(json.dumps(old) + "\n" + "".join(rows))
        before, more = path.read_text(), ("--radius",) if "radius" in path.name else ()
        for images in ("0:10", "10:20"):  # also where there is nothing left to decide
            cli.refuses("certify", other, *asked, *more, "--index", images, saying=["has label", "another split"])
        assert path.read_text() == before
        assert cli("certify", work, *asked, *more, "--index", "5:12") == 0
        assert path.read_text().startswith(before) and path.read_text().count("\n") == 13


def test_two_networks_of_one_name_are_not_exported_together(cli, work, small):
    other = small.rename("a.safetensors")
    Path("b").mkdir()
    shutil.copy(other, "b/a.safetensors")
    words = ("export", work, "bench", "--eps", "0.02", "--count", "4", "--network", other)
    cli.refuses(*words, "--network", "b/a.safetensors", saying=["a.safetensors and b/a.safetensors", "both called a"])
    assert not Path("bench").exists()
    assert cli(*words, "--network", other) == 0  # one network, said twice


def test_mistakes(cli, work, small):
    cli.refuses("compact", work, "none", saying=["no variant 'none'", VARIANT])
    cli.refuses("compact", work, VARIANT, "--method", "guess", saying=["crown or ibp", "guess"])
    cli.refuses("compact", work, VARIANT, "-o", work, saying=["is a folder"])
    cli.refuses("certify", work, "--network", small, "--variant", VARIANT, saying=["--network and --variant"])
    cli.refuses("certify", work, "--network", "none.safetensors", saying=["none.safetensors"])
    weights = work / VARIANT / "finetune" / "model.safetensors"
    cli.refuses("certify", work, "--network", weights, saying=["not a compacted network"])
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    write_compacted(compact(other, (1, 4, 4)), "other.safetensors")
    cli.refuses("certify", work, "--network", "other.safetensors", saying=["(1, 4, 4)", "(1, 8, 8)"])
