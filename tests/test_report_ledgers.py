"""Which ledger a report's figures come from, what all of them show together, radii and stages on the page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from certifiers.radius import RadiusLedger, RadiusVerdict
from certifiers.verdict import Ledger, Status, read_ledger
from certprune import reports
from certprune.reports.radius_rows import radius_rows
from certprune.reports.read import read_run
from certprune.reports.stages import stages_rows
from certprune.reports.together import ledger_together, together_rows
from tests.run_folder import config_of, verdict, write_run

OWN = 3 * ["certified"] + 3 * ["unknown"] + ["timeout"] + 2 * ["falsified"] + ["misclassified"]


@pytest.fixture
def folder(tmp_path):
    """One network, ten images at eps 0.1 by the recipe's methods: 3 certified, 4 open, 2 broken, 1 wrong."""
    config = config_of("one", eps=(0.1,))
    config["variants"] = [{"dense": True, "name": "dense"}]
    path = tmp_path / "one"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    add(path, "eps-0.1", OWN)
    return path


def add(folder, name, statuses, eps=0.1, method="ibp+crown-ibp+crown", by="crown", model="m", start=0, **header):
    header = {
        "model": model,
        "data": "mnist-5k",
        "split": "test",
        "eps": eps,
        "norm": "linf",
        "method": method,
    } | header
    with Ledger(folder / "certificates" / "dense" / f"{name}.jsonl", {**header, "eps": eps}) as ledger:
        ledger.append([verdict(index, status, eps, by) for index, status in enumerate(statuses, start)])


def add_radii(folder, rows, largest=0.2, name=None, model="m", method="ibp+crown-ibp+crown"):
    """``rows``: (radius, broken) by image; a radius of None: predicted wrong."""
    header = {"model": model, "data": "mnist-5k", "split": "test", "norm": "linf", "method": method}
    header |= {"largest": largest, "tolerance": 0.01, "attack_steps": 20}
    path = folder / "certificates" / "dense" / f"{name or f'radius-{largest:g}-0.01'}.jsonl"
    with RadiusLedger(path, header) as ledger:
        for index, (radius, broken) in enumerate(rows):
            status = Status.misclassified if radius is None else Status.certified if radius else Status.unknown
            right = radius is not None
            ledger.append([RadiusVerdict(index, 0, 0 if right else 1, status, radius or 0.0, broken, "crown", 0.5)])


def dense(folder):
    return read_run(folder).variant("dense")


def counts(view):
    summary = view.summary
    return summary.clean.count, summary.attack.count, summary.certified.count, summary.n


def test_the_recipes_methods_without_a_limit_come_first_whatever_the_files_are_called(folder):
    better = ["certified"] * 7 + OWN[7:]
    add(folder, "eps-0.1-10s", better, input_seconds=10)
    add(folder, "eps-0.1-alpha-crown", better, method="alpha-crown", by="alpha-crown")
    add(folder, "eps-0.1-external-Marabou", better, method="ibp+crown-ibp+crown+external:Marabou")
    add(folder, "eps-0.1 (copy)", OWN[:4])
    found = dense(folder)
    assert found.ledger(0.1).path.name == "eps-0.1.jsonl"  # all others sort before it
    assert counts(found.ledger(0.1)) == (9, 7, 3, 10)
    assert len(found.others) == 4 and len(found.ledgers) == 1
    ways = {row.method for row in reports.summary_rows(read_run(folder), others=True)}
    assert "ibp+crown-ibp+crown, 10 s an image" in ways and "alpha-crown" in ways
    assert "ibp+crown-ibp+crown, 10 s an image, eps 0.1</h3>" in reports.write_report(folder).read_text()


def test_a_ledger_that_was_moved_aside_is_not_published(folder):
    """It sorts first, and has more images, but is of the network that was there before."""
    add(folder, "eps-0.1-old", ["certified"] * 12, model="before")
    run = read_run(folder)
    found = run.variant("dense")
    assert found.ledger(0.1).path.name == "eps-0.1.jsonl" and counts(found.ledger(0.1)) == (9, 7, 3, 10)
    assert any("eps-0.1-old.jsonl is about other weights than eps-0.1.jsonl" in line for line in run.missing)
    add(folder, "eps-0.1 (longer)", [*OWN, "certified"])  # of the same network, the one with more images is told
    assert counts(dense(folder).ledger(0.1)) == (10, 8, 4, 11)


def test_together_by_hand(folder):
    add(folder, "eps-0.1-alpha", [*OWN[:3], "certified", *OWN[4:]], method="alpha-crown", by="alpha-crown")
    add(folder, "eps-0.2", ["unknown"] * 4 + ["certified"], eps=0.2)  # image 4 is certified at a larger eps
    add(folder, "eps-0.05", ["unknown"] * 5 + ["falsified"], eps=0.05)  # image 5 is broken at a smaller one
    add_radii(folder, [(0.2, None)] * 5 + [(0.01, 0.05), (0.11, 0.3)])  # image 6 is certified up to 0.11
    add(folder, "other-weights", ["certified"] * 10, method="alpha-crown", model="other")
    view = ledger_together(dense(folder), 0.1)
    by = {row.index: (row.status, row.method) for row in view.verdicts}
    assert by[3] == (Status.certified, "alpha-crown") and by[4] == (Status.certified, "crown")
    assert by[5] == (Status.falsified, "crown") and by[6] == (Status.certified, "crown")
    assert counts(view) == (9, 6, 6, 10)
    assert ledger_together(dense(folder), 0.3) is None
    run = read_run(folder)
    assert run.alarms == [] and list(together_rows(run)) == [0.05, 0.1, 0.2]
    page = reports.write_report(folder).read_text()
    assert "By all methods together" in page and "radii by ibp+crown-ibp+crown" in page


def test_together_counts_images_without_regard_to_how_they_came_out(folder):
    # Ledgers at other eps hold more images; only those that are decided there could be decided here.
    add(folder, "eps-0.2", ["unknown"] * 10 + ["certified"] * 2, eps=0.2)
    assert counts(ledger_together(dense(folder), 0.1)) == (9, 7, 3, 10)
    assert list(together_rows(read_run(folder))) == [0.2]  # where images 7 to 9 are known to be broken, or wrong
    # Radii are looked for of every image, so that all of these count.
    start = [(0.05, None)] * 9 + [(None, None), (0.05, None), (0.05, None), (None, None)]
    add_radii(folder, start)
    assert counts(ledger_together(dense(folder), 0.1)) == (11, 9, 5, 13)  # images 10 and 11 by the ledger at 0.2
    add_radii(folder, start + [(0.09, None)] * 17, largest=0.09)  # not as far as 0.1
    assert counts(ledger_together(dense(folder), 0.1)) == (11, 9, 5, 13)


@pytest.mark.parametrize("broken", ["falsified", "misclassified"])
def test_ledgers_that_contradict_each_other_are_an_alarm(folder, broken):
    add(folder, "eps-0.1-other", [broken], method="external", by="external:tool")
    view = read_run(folder)
    (alarm,) = view.alarms
    assert "eps-0.1.jsonl has image 0 certified" in alarm and "eps-0.1-other.jsonl" in alarm
    assert view.variant("dense").ledger(0.1) is None  # the claim is wrong, the counterexample was seen
    assert [ledger.path.stem for ledger in view.variant("dense").others] == ["eps-0.1-other"]
    assert "A certificate was contradicted." in reports.write_report(folder).read_text()


def test_contradictions_are_found_across_eps_and_radii(folder):
    add(folder, "eps-0.2", ["certified"], eps=0.2, start=7)  # image 7 is broken at 0.1
    add_radii(folder, [(0.05, 0.1), (0.15, None)])  # image 0 is certified at 0.1 by the ledger
    names = {re.match(r"dense: (\S+)", alarm)[1] for alarm in read_run(folder).alarms}
    assert names == {"eps-0.2.jsonl", "eps-0.1.jsonl"}
    assert dense(folder).ledgers == [] and len(dense(folder).radii) == 1


def test_what_does_not_contradict(folder):
    add(folder, "eps-0.05", ["certified"] * 9, eps=0.05)  # certified at a smaller eps than broken
    add(folder, "eps-0.1-b", ["falsified"] * 7, method="alpha-crown", model="other")  # other weights
    add(folder, "eps-0.1-c", ["falsified"] * 7, method="alpha-crown", split="validation")  # other images
    add_radii(folder, [(0.1, 0.10001), (0.1, 0.15)])
    assert read_run(folder).alarms == []


def test_radii_by_hand_on_the_page(folder):
    add_radii(folder, [(0.2, None), (0.15, 0.18), (0.1, 0.12), (0.05, 0.1), (0.0, 0.01), (None, None)])
    (rows,) = radius_rows(read_run(folder))
    (row,) = rows
    assert row.n == 6 and row.median == pytest.approx(0.1) and row.mean == pytest.approx(0.5 / 6)
    assert row.radii == (0.1,) and row.certified[0].value == 0.5  # images 0, 1 and 2
    assert row.certification_seconds == 3.0
    page = reports.write_report(folder).read_text()
    section = page.split("The largest eps certified for each image")[1].split("<section>")[0]
    assert "<svg" in section and "0.1000" in section and "0.0833" in section
    assert json.loads((folder / "summary.json").read_text())["radii"][0]["median"] == pytest.approx(0.1)
    lines = (folder / "radii.csv").read_text().splitlines()
    assert [float(line.split(",")[4]) for line in lines[1:]] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert (folder / "radii.png").read_bytes()[:4] == b"\x89PNG"


def test_a_radius_in_float32_counts_at_the_eps_it_stands_for(folder):
    largest = 0.7
    add_radii(folder, [(torch.tensor(largest).item(), None)] * 2, largest=largest)
    (folder / "certificates" / "dense" / "eps-0.1.jsonl").unlink()  # so that quarters of the largest are shown
    ((row,),) = radius_rows(read_run(folder))
    assert torch.tensor(largest).item() < largest
    assert row.radii[-1] == largest and row.certified[-1].value == 1.0


def test_radii_found_otherwise_are_folded_away(folder):
    add_radii(folder, [(0.1, None)])
    add_radii(folder, [(0.3, None)], largest=0.5)
    add_radii(folder, [(0.4, None)], largest=0.5, name="radius-0.5-0.01-alpha-crown", method="alpha-crown")
    first, second, third = (rows[0] for rows in radius_rows(read_run(folder)))
    assert (first.largest, second.largest, third.method) == (0.5, 0.2, "alpha-crown")
    assert "Found otherwise: ibp+crown-ibp+crown up to eps 0.2" in reports.write_report(folder).read_text()


def test_every_networks_stages_in_one_table(tmp_path):
    folder = write_run(tmp_path / "run", count=40)
    path = folder / "certificates" / "dense" / "eps-0.1.jsonl"
    header, rows = read_ledger(path)
    path.unlink()
    stages = {"clean": 0.25, "attack": 0.5, "ibp": 1.0}
    told = [replace(row, stages=stages, seconds=1.75) for row in rows]
    with Ledger(path, header) as ledger:
        ledger.append(told)
    found = {row.label: row for row in stages_rows(read_run(folder))}
    assert len(found) == 5  # every network, with or without times
    ibp = found["dense"].found["ibp"]
    count = sum(row.method == "ibp" for row in rows)
    assert (ibp.decided, ibp.asked, ibp.seconds) == (count, 40, 40.0)
    page = reports.write_report(folder).read_text()
    table = page.split("How each image was decided", 1)[1]
    assert f'<td data-heading="ibp">{count} <span class="interval">of 40, 40 s</span></td>' in table
    assert '<td data-heading="Time">1 min 10 s</td>' in table
    left = sum(row.status is Status.unknown for row in rows)
    assert f'<td data-heading="Left open">{left}</td>' in table


def test_curves_of_one_network_by_several_methods_are_told_apart(folder):
    add(folder, "eps-0.1-10s", OWN, input_seconds=10)
    add(folder, "eps-0.1-alpha-crown", OWN, method="alpha-crown")
    curves = reports.read_curves(sorted(Path(folder).glob("certificates/dense/*.jsonl")))
    assert [curve.label for curve in curves] == [
        "dense (alpha-crown)",
        "dense (ibp+crown-ibp+crown)",
        "dense (ibp+crown-ibp+crown, 10 s an image)",
    ]


def test_curves_tell_no_more_apart_than_is_needed(folder, tmp_path):
    certificates = folder / "certificates" / "dense"
    add_radii(folder, [(0.2, None)] * 10)
    labels = [curve.label for curve in reports.read_curves(sorted(certificates.glob("*.jsonl")))]
    assert labels == ["dense (radii)", "dense"]  # not by their tolerance, which only one has
    other = tmp_path / "two"
    shutil.copytree(folder, other)
    path = other / "certificates" / "dense" / "eps-0.1.jsonl"
    path.write_text(path.read_text().replace('"model": "m"', '"model": "n"'))
    curves = reports.read_curves([certificates / "eps-0.1.jsonl", path])
    assert [curve.label for curve in curves] == ["dense (one)", "dense (two)"]  # by the runs' folders alone
    log = tmp_path / "one.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0\n")
    shutil.copy(log, other / "one.tsv")
    assert [curve.label for curve in reports.read_curves([log, other / "one.tsv"])] == [
        f"one ({tmp_path.name})",
        "one (two)",
    ]


def test_labels_never_leave_the_chart_without_room(folder):
    """Long labels go below, and the picture grows by them; the chart itself stays as large."""
    from certprune.reports.plot import curve_figure

    add(folder, "eps-0.1-long", OWN, method="ibp+crown-ibp+crown+alpha-crown+exact")
    add_radii(folder, [(0.2, None)] * 10)
    paths = sorted((folder / "certificates" / "dense").glob("*.jsonl"))
    for some in (paths[:1], paths[:2], paths):
        curves = reports.read_curves(some)
        figure = curve_figure(curves)
        figure.canvas.draw()
        box = figure.axes[0].get_window_extent()
        assert box.width > 0.6 * figure.dpi * 7.2 and box.height > 0.7 * figure.dpi * 4.2
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(box)
            assert figure.bbox.containsx(legend.get_window_extent().x1 - 1)
