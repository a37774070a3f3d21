"""The cascade and radii from the command line: ledgers, tables, limits, curves, the page."""

import csv
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from certifiers.methods import CASCADE, METHODS
from certifiers.radius import read_radius_ledger
from certifiers.stages import summarise_stages
from certifiers.verdict import Ledger, Status, Verdict, read_ledger
from certprune import reports
from certprune.radii import rounded_down
from certprune.reports.ledgers import LedgerView
from certprune.reports.read import read_run
from certprune.reports.stages import stage_rows, stage_table
from tests.commands import ONE_EPOCH, VARIANT, smoke_run
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke_run(tmp_path_factory.mktemp("finished") / "smoke", *ONE_EPOCH, "certify.count=8")


def ledgers(work, pattern):
    return sorted((work / "certificates" / VARIANT).glob(pattern))


def test_the_cascade_its_ledger_and_its_table(cli, work):
    words = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--method", "cascade", "--input-seconds", "1")
    assert cli(*words) == 0, cli.err
    assert "who decided" in cli.out and "attack (PGD)" in cli.out
    (path,) = ledgers(work, f"eps-0.05-{'+'.join([*CASCADE, 'exact'])}-1s.jsonl")
    header, rows = read_ledger(path)
    assert header["method"] == "+".join([*CASCADE, "exact"]) and header["input_seconds"] == 1 and len(rows) == 8
    assert all(row.stages["clean"] >= 0 for row in rows)
    before = path.read_bytes()
    assert cli(*words) == 0 and path.read_bytes() == before
    assert cli("report", work) == 0
    assert "What each stage certified and broke" in (work / "report.html").read_text()


def test_the_commands_time_is_kept_and_the_same_command_goes_on(cli, work, monkeypatch):
    def slow(model, x, y, threat, classes, deadline):
        time.sleep(0.4)
        return torch.full(classes.shape, -1.0)

    monkeypatch.setitem(METHODS, "symbolic", slow)
    words = ("certify", work, "--variant", VARIANT, "--eps", "0.05", "--method", "symbolic")
    assert cli(*words, "--run-seconds", "0.3") == 0, cli.err
    assert "stopped by the time limit after" in cli.out + cli.err
    assert "Cut short" in cli.out and " of the 8 images asked for are in it" in cli.out
    (path,) = ledgers(work, "eps-0.05-symbolic.jsonl")
    some = len(read_ledger(path)[1])
    assert some < 8
    assert cli(*words) == 0 and len(read_ledger(path)[1]) == 8 and "Cut short" not in cli.out


def test_figures_of_a_part_are_said_to_be_of_a_part(cli, work, monkeypatch):
    """Time ends within the one batch, at the first image that is open: those after it that are decided do not count."""
    words = ("certify", work, "--variant", VARIANT, "--eps", "0.001", "--method", "ibp", "--method", "symbolic")

    monkeypatch.setitem(METHODS, "ibp", lambda *args: torch.full(args[4].shape, -1.0))
    assert cli(*words, "--count", "3") == 0 and "Cut short" not in cli.out
    (path,) = ledgers(work, "eps-0.001-ibp+symbolic.jsonl")
    assert len(read_ledger(path)[1]) == 3
    monkeypatch.setitem(METHODS, "symbolic", lambda *args: pytest.fail("asked after the time"))
    monkeypatch.setitem(METHODS, "ibp", lambda *args: time.sleep(0.6) or torch.full(args[4].shape, -1.0))
    assert cli(*words, "--run-seconds", "0.5") == 0, cli.err
    held = len(read_ledger(path)[1])
    assert 3 <= held < 8 and f"{path}: {held} images, clean" in cli.out
    assert f"Cut short: {path}: {held} of the 8 images asked for are in it" in cli.out


def test_a_cut_in_radii_is_said(cli, work, monkeypatch):
    monkeypatch.setattr("certprune.cli.radii.Countdown", lambda seconds: lambda: 1e-9)
    words = ("certify", work, "--variant", VARIANT, "--radius", "--eps", "0.1", "--run-seconds", "1")
    assert cli(*words) == 0, cli.err
    assert "Cut short" in cli.out and "0 of the 8 images asked for" in cli.out


def test_radii_and_their_curve(cli, work):
    words = ("certify", work, "--variant", VARIANT, "--radius", "--eps", "0.1", "--tolerance", "0.005")
    assert cli(*words) == 0, cli.err
    assert "half of the images up to eps" in cli.out
    (path,) = ledgers(work, "radius-*.jsonl")
    header, rows = read_radius_ledger(path)
    assert (path.name, header["largest"], header["tolerance"]) == ("radius-0.1-0.005.jsonl", 0.1, 0.005)
    assert len(rows) == 8 and any(0 < row.radius < 0.1 for row in rows)
    before = path.read_bytes()
    assert cli(*words) == 0 and path.read_bytes() == before
    other = ledgers(work, "eps-0.02.jsonl")[0]
    assert cli("curve", path, other, "-o", "curve.png") == 0, cli.err
    points = list(csv.DictReader(Path("curve.csv").read_text().splitlines()))
    assert Path("curve.png").stat().st_size > 1000
    radii = [row.radius for row in rows if row.prediction == row.label]
    mine = [point for point in points if float(point["eps"]) not in (0.0, 0.02)]
    assert mine
    for point in mine:
        eps = float(point["eps"])
        assert float(point["certified"]) == sum(radius >= eps for radius in radii) / 8
        assert float(point["certified_lower"]) < float(point["certified_upper"])
        assert float(point["attack"]) >= float(point["certified"])
    assert cli("report", work) == 0
    assert not [line for line in read_run(work).missing if "radius" in line]


@pytest.mark.parametrize(
    "words, saying",
    [
        (["--tolerance", "0.01"], ["--radius too"]),
        (["--radius", "--input-seconds", "3"], ["Leave --input-seconds out"]),
        (["--input-seconds", "0"], ["--input-seconds", "above 0"]),
        (["--radius", "--eps", "0.1", "--eps", "0.2"], ["--eps once"]),
        (["--radius", "--method", "lirpa-crown"], ["lirpa-crown", "crown-ibp"]),
        (["--radius", "--tolerance", "0"], ["tolerance"]),
        (["--method", "cascades"], ["cascade"]),
    ],
)
def test_requests_that_make_no_sense(cli, work, words, saying):
    cli.refuses("certify", work, *words, saying=saying)


def test_the_missing_extra_is_named_whole(cli, work, monkeypatch):
    """Square brackets are markup to the console."""
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    words = ("--variant", VARIANT, "--eps", "0.001", "--method", "autoattack")
    cli.refuses("certify", work, *words, saying=["pip install 'certprune[attacks]'"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli("doctor") == 0 and "certprune[attacks]" in cli.out


def verdict(index, status, method, stages):
    seconds = sum(stages.values())
    return Verdict(index, 0, int(status == "misclassified"), Status(status), 0.1, "linf", method, None, seconds, stages)


ROWS = [
    verdict(0, "misclassified", "clean", {"clean": 1.0}),
    verdict(1, "falsified", "attack", {"clean": 1.0, "attack": 2.0, "ibp": 0.5}),
    verdict(2, "certified", "ibp", {"clean": 1.0, "attack": 2.0, "ibp": 0.5}),
    verdict(3, "timeout", "crown", {"clean": 1.0, "attack": 2.0, "ibp": 0.5, "crown": 4.0}),
]


def test_what_each_stage_decided():
    found = {row.stage: row for row in summarise_stages(ROWS, ["ibp", "crown"])}
    assert list(found) == ["clean", "attack", "ibp", "crown"]
    assert [(row.asked, row.decided, row.left, row.seconds) for row in found.values()] == [
        (4, 1, 0, 4.0),
        (3, 1, 0, 6.0),
        (3, 1, 0, 1.5),
        (1, 0, 1, 4.0),
    ]
    old = [verdict(0, "certified", "ibp", {})]
    assert [(row.asked, row.certified, row.seconds) for row in summarise_stages(old)] == [(None, 1, None)]


def test_the_table_on_the_console_and_on_the_page(tmp_path, capsys):
    run = write_run(tmp_path / "demo", count=20)
    header = {"model": "m", "data": "mnist-5k", "split": "test", "eps": 0.1, "norm": "linf", "method": "ibp+crown"}
    path = run / "certificates" / "dense" / "eps-0.1-ibp+crown.jsonl"
    with Ledger(path, header) as ledger:
        ledger.append(ROWS)
    view = LedgerView(path, *read_ledger(path))
    assert stage_rows(view)[-1] == ("crown", "1", "", "", "", "1", "4.00")
    Console(width=100).print(stage_table(view))
    assert "clean prediction" in capsys.readouterr().out
    page = reports.write_report(run).read_text()
    assert page.count("How many images each stage") == 1 and "<td>6.00</td>" in page


def test_radii_are_printed_rounded_down():
    assert rounded_down(0.09999) == "0.0999" and rounded_down(0.1) == "0.1000"
