"""Smoothing in recipes, on the command line, in run folders, curves and reports."""

import csv
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml

from certifiers.errors import InputError
from certifiers.smoothing import (
    SmoothedLedger,
    SmoothedVerdict,
    certified_accuracy,
    certified_radius,
    lower_confidence_bound,
    read_smoothed_ledger,
)
from certifiers.verdict import Status
from certprune import reports
from certprune.data import load_data
from certprune.recipes import dump_recipe, load_recipe
from certprune.reports.curves import accuracy_at, rate_at
from certprune.runs import open_run
from certprune.smoothing import smooth_network
from tests.commands import NOISY, SMOKE, VARIANT, ledger_path, smoke_run
from tests.run_folder import write_run

QUICK = ("pretrain.epochs=2", "prune.epochs=1", "finetune.epochs=1", "certify.smoothing.n=200")
LOG = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was trained under noise and certified by smoothing; tests work on copies."""
    return smoke_run(tmp_path_factory.mktemp("finished") / "noisy", *NOISY, *QUICK, "certify.smoothing.count=8")


def ledger(folder, variant=VARIANT, name="smoothing-0.25"):
    return ledger_path(folder, name, variant)


# ---- recipes


def test_a_recipe_trained_under_noise_is_smoothed_by_itself():
    recipe = load_recipe(SMOKE, NOISY)
    settings = recipe.certify.smoothing
    assert (settings.sigma, settings.n0, settings.n, settings.alpha) == (0.25, 100, 10_000, 0.001)
    assert settings.radii == (0.0, 0.25, 0.5, 0.75, 1.0) and settings.count == 500 and recipe.eps_grid == ()
    assert yaml.safe_load(dump_recipe(recipe))["certify"]["smoothing"]["sigma"] == 0.25  # the run folder says all


def test_other_recipes_are_as_they_were():
    recipe = load_recipe(SMOKE)
    assert recipe.certify.smoothing is None and "smoothing" not in dump_recipe(recipe)
    given = load_recipe(SMOKE, ["certify.smoothing={sigma: 0.5, radii: [1, 0.5]}"])  # but may ask for it
    assert given.certify.smoothing.sigma == 0.5 and given.certify.smoothing.radii == (0.5, 1.0)
    assert given.eps_grid == recipe.eps_grid


@pytest.mark.parametrize("settings", [NOISY, (*NOISY, "certify.smoothing=null"), ("certify.smoothing.sigma=0.5",), ()])
def test_what_is_written_is_read_back(settings, tmp_path):
    recipe = load_recipe(SMOKE, settings)
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe
    assert (recipe.certify.smoothing is None) == (settings in ((), (*NOISY, "certify.smoothing=null")))


@pytest.mark.parametrize(
    ("setting", "saying"),
    [
        ("certify.smoothing={}", ["certify", "smoothing.sigma must be given", "crown_ibp"]),
        ("certify.smoothing.sigma=0", ["certify.smoothing.sigma", "greater than 0"]),
        ("certify.smoothing={sigma: 1, n: 0}", ["certify.smoothing.n", "at least 1"]),
        ("certify.smoothing={sigma: 1, alpha: 1}", ["certify.smoothing.alpha", "less than 1"]),
        ("certify.smoothing={sigma: 1, radii: [0, 0.0]}", ["certify.smoothing.radii", "twice"]),
        ("certify.smoothing={sigma: 1, radii: 0.5}", ["certify.smoothing.radii", "Write a list"]),
        ("certify.smoothing={sigma: 1, samples: 3}", ["certify.smoothing.samples", "Allowed"]),
    ],
)
def test_mistakes_in_recipes(setting, saying):
    with pytest.raises(InputError) as caught:
        load_recipe(SMOKE, [setting])
    assert all(word in str(caught.value) for word in saying), caught.value


# ---- the run folder and the commands


def test_a_run_leaves_a_ledger_of_each_network(finished):
    for variant in (VARIANT, "magnitude-erk-0.8"):
        assert [path.name for path in (finished / "certificates" / variant).iterdir()] == ["smoothing-0.25.jsonl"]
        header, verdicts = read_smoothed_ledger(ledger(finished, variant))
        assert header["variant"] == variant and header["data"] == "digits" and header["norm"] == "l2"
        assert (header["sigma"], header["n0"], header["n"], header["alpha"], header["seed"]) == (
            0.25,
            100,
            200,
            0.001,
            0,
        )
        assert header["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert [v.index for v in verdicts] == list(range(8)) and all(sum(v.counts) == 200 for v in verdicts)
        for v in verdicts:
            bound = lower_confidence_bound(v.counts[v.prediction], 200, 0.001) if v.prediction is not None else 0.0
            assert v.radius == max(certified_radius(bound, 0.25) - 8 * 2.0**-21, 0.0)  # 64 pixels
        assert header["slack"] == 8 * 2.0**-21


def test_run_again_does_nothing_and_a_changed_certify_section_is_accepted(cli, work):
    before = ledger(work).read_bytes()
    assert cli("run", work) == 0
    assert ledger(work).read_bytes() == before and "r = 0.25" in cli.out and "Certified %" in cli.out
    assert cli("run", work, "certify.smoothing.count=12", "certify.smoothing.radii=[0.1]") == 0
    assert ledger(work).read_bytes().startswith(before) and len(read_smoothed_ledger(ledger(work))[1]) == 12
    assert "r = 0.1" in cli.out and "r = 0.25" not in cli.out
    cli.refuses("run", work, "certify.smoothing.n=300", saying=["smoothing-0.25.jsonl", "another n", "200", "300"])


def test_smooth_goes_on_with_the_ledger_of_the_run(cli, work, finished):
    before = ledger(work).read_bytes()
    assert cli("smooth", work, "--variant", VARIANT, "--index", "6:11") == 0
    assert f"{ledger(work)}: 11 images" in cli.out and "at r 0.25" in cli.out
    after = ledger(work).read_bytes()
    assert after.startswith(before) and len(read_smoothed_ledger(ledger(work))[1]) == 11
    assert cli("smooth", work) == 0 and ledger(work).read_bytes() == after  # 8 images, all there
    # A ledger made from nothing has the same counts, whatever part of the images was asked for first.
    shutil.rmtree(work / "certificates")
    assert cli("smooth", work, "--index", "4:11") == 0 and cli("smooth", work, "--count", "11") == 0
    again = {v.index: (v.counts, v.radius) for v in read_smoothed_ledger(ledger(work))[1]}
    lines = map(json.loads, after.decode().splitlines()[1:])
    assert again == {line["index"]: (tuple(line["counts"]), line["radius"]) for line in lines}


def test_a_ledger_holds_no_images_of_another_split(work):
    run, settings = open_run(work), open_run(work).recipe.certify.smoothing
    again = (VARIANT, settings, load_data("digits", seed=1, validation=0.1), torch.device("cpu"))
    with pytest.raises(InputError, match="other images"):
        smooth_network(run, *again)
    path = ledger(work)
    header, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({k: v for k, v in json.loads(header).items() if k != "images"}) + "\n" + "".join(rows))
    with pytest.raises(InputError, match="has label .* another split"):  # though all that is asked is decided
        smooth_network(run, *again)
    assert smooth_network(run, VARIANT, settings, load_data("digits", seed=0, validation=0.1), again[-1]) == path


def test_smooth_with_other_settings_has_a_ledger_of_its_own(cli, work):
    before = ledger(work).read_bytes()
    words = ("--variant", "pretrain", "--count", "3", "--n", "150", "--alpha", "0.01", "--n0", "20")
    assert cli("smooth", work, *words, "--sigma", "0.5", "--sigma", "0.25") == 0
    for sigma in (0.5, 0.25):
        header, verdicts = read_smoothed_ledger(ledger(work, "pretrain", f"smoothing-{sigma}-n0=20-n=150-alpha=0.01"))
        assert (header["sigma"], header["n"], header["alpha"], len(verdicts)) == (sigma, 150, 0.01, 3)
    assert ledger(work).read_bytes() == before
    view = reports.read_run(work)
    assert view.missing == [] and [ledger.usual for ledger in view.variant("pretrain").smoothed] == [False, False]
    groups = reports.smoothed_rows(view)
    assert [[row.variant for row in rows] for rows in groups] == [
        [VARIANT, "magnitude-erk-0.8"], ["pretrain"], ["pretrain"]
    ]  # fmt: skip
    assert "Smoothed otherwise: sigma 0.25, n 150 and sigma 0.5, n 150" in reports.write_report(work).read_text()


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["--sigma", "0"], ["sigma", "positive"]),
        (["--sigma", "nan"], ["sigma", "positive"]),
        (["--n", "0"], ["n, a number of noisy samples", "at least 1"]),
        (["--n0", "0"], ["n0, a number of noisy samples", "at least 1"]),
        (["--alpha", "1"], ["alpha", "strictly between 0 and 1"]),
        (["--alpha", "0"], ["alpha", "strictly between 0 and 1"]),
        (["--variant", "x"], ["no variant 'x'", VARIANT]),
        (["--index", "5:5"], ["--index", "A below B"]),
        (["--count", "0"], ["--count", "at least 1"]),
        (["--count", "99999"], ["0:360"]),
        (["--count", "5", "--index", "0:5"], ["Give one of them"]),
    ],
)
def test_wrong_requests(cli, finished, words, saying):
    cli.refuses("smooth", finished, *words, saying=saying)


def test_smooth_says_what_is_not_there(cli, tmp_path, work):
    cli.refuses("smooth", tmp_path, saying=["not a run folder"])
    config = work / "config.yaml"
    config.write_text(re.sub(r"  smoothing:\n(    .*\n|    - .*\n)+", "  smoothing: null\n", config.read_text()))
    assert "smoothing: null" in config.read_text()
    cli.refuses("smooth", work, saying=["how much noise", "--sigma"])
    shutil.rmtree(work / VARIANT / "finetune")
    cli.refuses("smooth", work, "--sigma", "0.5", saying=["finetune", "not complete", "certprune run"])


def test_the_table_at_an_eps_points_to_the_one_of_radii(cli, finished):
    cli.refuses("table", finished, saying=["no network certified at any eps", "certprune compare"])
    assert cli("compare", finished, "-o", "page.md") == 0 and "r = 0.25" in Path("page.md").read_text()


# ---- curves


def test_ledgers_and_papers_logs_share_a_picture(cli, finished, tmp_path):
    log = tmp_path / "cohen.tsv"
    log.write_text(LOG + "0\t1\t1\t0.5\t1\t0:00:01\n20\t2\t-1\t0.0\t0\t0:00:01\n")
    paths = [ledger(finished), ledger(finished, "magnitude-erk-0.8"), log]
    assert cli("curve", *paths, "-o", tmp_path / "c.png") == 0
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert {row["network"] for row in rows} == {"learned scores, 80 %", "least magnitude, 80 %", "cohen"}
    assert {row["norm"] for row in rows} == {"l2"}
    curves = {curve.label: curve for curve in reports.read_curves(paths)}
    for path, label in zip(paths, ("learned scores, 80 %", "least magnitude, 80 %"), strict=False):
        curve, verdicts = curves[label], read_smoothed_ledger(path)[1]
        assert curve.stepped and curve.network.sparsity == 0.8
        for radius in [0.0, 0.1, 0.25, *(v.radius for v in verdicts), *(v.radius + 1e-9 for v in verdicts), 2.0]:
            exact = certified_accuracy(verdicts, radius)
            found = rate_at(curve, radius)
            assert (found.value, found.lower, found.upper) == (exact.value, exact.low, exact.high)
            assert accuracy_at(curve, radius) == exact.value


COUNTS = {status: ((1, 0), (1, 0)) for status in (Status.misclassified, Status.abstained)}
COUNTS[Status.certified] = (0, 1), (0, 1)


def test_a_log_and_a_ledger_of_the_same_verdicts_give_the_same_curve(tmp_path):
    radii = [0.4, 0.1, 0.9, 0.4, 0.0, 0.7]
    statuses = [Status.certified, Status.certified, Status.misclassified, Status.certified, Status.abstained]
    statuses.append(Status.certified)
    rows = [
        SmoothedVerdict(i, 1, {"misclassified": 0, "abstained": None}.get(s.value, 1), s, r, *COUNTS[s], 0.1)
        for i, (r, s) in enumerate(zip(radii, statuses, strict=True))
    ]
    with SmoothedLedger(tmp_path / "a.jsonl", {"sigma": 0.5, "norm": "l2", "variant": "dense"}) as written:
        written.append(rows)
    lines = [f"{v.index}\t1\t{-1 if v.prediction is None else v.prediction}\t{v.radius}\t" for v in rows]
    right = [f"{line}{int(v.status is Status.certified)}\t0:00:01\n" for line, v in zip(lines, rows, strict=True)]
    (tmp_path / "a.tsv").write_text(LOG + "".join(right))
    ours, theirs = ([c.points for c in reports.read_curves([tmp_path / name])] for name in ("a.jsonl", "a.tsv"))
    assert ours == theirs and [point.eps for point in ours[0]] == [0.0, 0.1, 0.4, 0.7]
    assert [point.certified.value for point in ours[0]] == [4 / 6, 4 / 6, 3 / 6, 1 / 6]


def test_ledgers_of_one_network_are_told_apart_by_what_differs(tmp_path):
    row = SmoothedVerdict(0, 1, 1, Status.certified, 0.3, (0, 1), (0, 1), 0.1)
    paths = []
    for sigma, seed in ((0.25, 0), (0.5, 0), (0.5, 1)):
        paths.append(tmp_path / f"{sigma}-{seed}.jsonl")
        with SmoothedLedger(paths[-1], {"sigma": sigma, "seed": seed, "n": 9, "variant": "dense"}) as written:
            written.append([row])
    labels = [curve.label for curve in reports.read_curves(paths)]
    assert labels == ["dense (sigma 0.25, seed 0)", "dense (sigma 0.5, seed 0)", "dense (sigma 0.5, seed 1)"]
    assert [c.label for c in reports.read_curves(paths[:2])] == ["dense (sigma 0.25)", "dense (sigma 0.5)"]


def test_radii_and_eps_of_different_norms_do_not_share_an_axis(finished, tmp_path):
    run = write_run(tmp_path / "linf", count=10, eps=(0.1,))
    with pytest.raises(InputError, match="one chart per norm"):
        reports.read_curves([ledger(finished), run / "certificates" / "dense" / "eps-0.1.jsonl"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text(ledger(finished).read_text().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="certprune smooth RUN"):
        reports.read_curves([empty])


# ---- reports


def test_the_report_shows_the_radii_of_the_recipe(work):
    verdicts = read_smoothed_ledger(ledger(work))[1]
    page = reports.write_report(work).read_text()
    row = re.search(r'<tr><th scope="row" class="left">learned scores, 80 %</th>(.*?)</tr>', page.replace("\xa0", " "))[
        1
    ]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
    for place, radius in enumerate((0.0, 0.25, 0.5, 0.75, 1.0), start=1):
        exact = certified_accuracy(verdicts, radius)
        assert cells[place].startswith(f"{100 * exact.value:.1f} [{100 * exact.low:.1f}, "), (radius, cells)
    assert "Nothing is certified yet" not in page and "certified by randomized smoothing on 8 test images" in page
    assert "certified at ℓ2 radius 0.25" in page and "Certified accuracy against radius" in page
    assert "Certified accuracy against eps" not in page and "How each image was decided" not in page
    assert "can certify no radius above" in page and "Clopper and Pearson" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
    assert any("Radius (ℓ2" in chart for chart in charts)
    assert (work / "smoothing.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (first, *_) = json.loads((work / "summary.json").read_text())["smoothing"]
    assert first["variant"] == VARIANT and first["certified"][0]["value"] == certified_accuracy(verdicts, 0.0).value


def test_the_report_says_what_smoothing_lacks(work):
    path = ledger(work)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    ledger(work, "magnitude-erk-0.8").unlink()
    ledger(work, "pretrain").parent.mkdir()
    shutil.copy(path, ledger(work, "pretrain"))
    ledger(work, "pretrain").write_text(path.read_text().splitlines(keepends=True)[0] + "{\n")
    missing = reports.read_run(work).missing
    assert any("pretrain: smoothing-0.25.jsonl cannot be read: Line 2" in line for line in missing)
    assert "magnitude-erk-0.8: not certified yet by smoothing with sigma 0.25." in missing
    page = reports.write_report(work).read_text()
    assert "This run is not finished" in page


def test_a_run_certified_both_ways_shows_both(tmp_path):
    run = write_run(tmp_path / "both", count=20, eps=(0.1,))
    for variant in ("dense", "score-erk-0.99", "magnitude-erk-0.99"):
        header = {"sigma": 0.5, "n0": 100, "n": 1000, "seed": 0, "variant": variant, "split": "test"}
        with SmoothedLedger(run / "certificates" / variant / "smoothing-0.5.jsonl", header) as written:
            held = 12 if variant == "score-erk-0.99" else 7
            counts = (0, 1), (0, 1)
            radii = [0.6 if i < held else 0.1 for i in range(20)]
            written.append([SmoothedVerdict(i, 1, 1, Status.certified, r, *counts, 0.0) for i, r in enumerate(radii)])
    page = reports.write_report(run).read_text().replace("\xa0", " ")
    for heading in ("Summary", "By randomized smoothing", "Certified accuracy against eps"):
        assert f"<h2>{heading}</h2>" in page
    assert "<h2>Certified accuracy against radius</h2>" in page
    # At radius 0.25 the scores' network holds 5 of 20 images more: 25 points, paired.
    assert re.search(r">\+25.0 <span", page) and "Certified accuracy at ℓ2 radius 0.25" in page
    assert (run / "curves.png").exists() and (run / "smoothing.png").exists()
