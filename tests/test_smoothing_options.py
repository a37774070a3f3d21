"""Noise, stopping rules and implied norms in recipes, on the command line, in curves and reports."""

import csv
import re

import pytest

from certifiers.errors import InputError
from certifiers.smoothing import (
    SmoothedLedger,
    SmoothedVerdict,
    Stopping,
    certified_radius,
    implied_radius,
    lower_sequence,
    read_smoothed_ledger,
)
from certifiers.verdict import Status
from certprune import reports
from certprune.recipes import dump_recipe, load_recipe
from tests.commands import NOISY, SMOKE, VARIANT, ledger_path, smoke_run
from tests.run_folder import write_run

EARLY = ("certify.smoothing.n=2000", "certify.smoothing.tolerance=0.05", "certify.smoothing.up_to=0.5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run certified with a stopping rule; tests work on copies."""
    epochs = ("pretrain.epochs=2", "prune.epochs=1", "finetune.epochs=1", "certify.smoothing.count=8")
    return smoke_run(tmp_path_factory.mktemp("finished") / "early", *NOISY, *EARLY, *epochs)


def ledger(folder, name="smoothing-0.25"):
    return ledger_path(folder, name)


# ---- recipes


def test_recipes_say_how_sampling_ends(tmp_path):
    recipe = load_recipe(SMOKE, [*NOISY, *EARLY, "certify.smoothing.decide=[0.5, 0.25]"])
    assert recipe.certify.smoothing.stopping == Stopping(0.05, 0.5, (0.25, 0.5))
    plain = load_recipe(SMOKE, NOISY).certify.smoothing
    assert plain.stopping is None and plain.noise == "gaussian" and not plain.shared_noise
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "config.yaml") == recipe
    for setting, saying in (
        ("certify.smoothing.noise=laplace", ["certify.smoothing.noise", "gaussian", "uniform"]),
        ("certify.smoothing.tolerance=0", ["certify.smoothing.tolerance", "greater than 0"]),
        ("certify.smoothing.up_to=1", ["up_to", "tolerance too"]),
        ("certify.smoothing.decide=[-1]", ["certify.smoothing.decide"]),
    ):
        with pytest.raises(InputError) as caught:
            load_recipe(SMOKE, [*NOISY, setting])
        assert all(word in str(caught.value) for word in saying), caught.value


# ---- commands and reports


def test_a_run_with_a_rule_leaves_what_it_drew(finished):
    header, verdicts = read_smoothed_ledger(ledger(finished))
    assert header["stopping"]["tolerance"] == 0.05 and header["stopping"]["up_to"] == 0.5 and header["pixels"] == 64
    assert len(verdicts) == 8 and min(v.samples for v in verdicts) < 2000 and max(v.samples for v in verdicts) <= 2000
    assert header["slack"] == 8 * 2.0**-21
    for v in verdicts:
        assert sum(v.counts) <= v.samples
        if v.prediction is not None:
            bound = float(lower_sequence(v.counts[v.prediction], v.samples, 0.001))
            assert v.radius == certified_radius(bound, 0.25) - header["slack"]
    page = reports.write_report(finished).read_text()
    assert "stopped early: tolerance 0.05, up to 0.5" in page and "on average" in page and "by betting" in page


def test_smooth_takes_noise_and_rules(cli, work):
    before = ledger(work).read_bytes()
    words = ("smooth", work, "--variant", VARIANT, "--count", "3")
    assert cli(*words, "--noise", "uniform", "--shared-noise", "--decide", "0.3", "--decide", "0.1") == 0
    assert "(l1)" in cli.out and "samples an image" in cli.out
    path = ledger(work, "smoothing-0.25-noise=uniform-decide=0.1+0.3-sharednoise=true")
    header, verdicts = read_smoothed_ledger(path)
    assert (header["noise"], header["norm"], header["shared_noise"]) == ("uniform", "l1", True)
    assert header["stopping"]["radii"] == [0.1, 0.3] and len(verdicts) == 3
    content = path.read_bytes()
    assert cli(*words, "--noise", "uniform", "--shared-noise", "--decide", "0.1", "--decide", "0.3") == 0
    assert path.read_bytes() == content and ledger(work).read_bytes() == before
    page = reports.write_report(work).read_text().replace("\xa0", " ")
    assert "Smoothed otherwise: uniform noise, sigma 0.25, n 2,000" in page and "certified ℓ1 radius" in page
    assert "certified at ℓ2 radius 0.25" in page  # the recipe's own stays the main one
    rows = list(csv.DictReader((work / "smoothing.csv").open()))
    assert {row["norm"] for row in rows} == {"l2"}  # one norm to a picture


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["--noise", "laplace"], ["gaussian or uniform"]),
        (["--tolerance", "0"], ["tolerance", "above 0"]),
        (["--tolerance", "nan"], ["tolerance", "above 0"]),
        (["--tolerance", "0.1", "--up-to", "-1"], ["up_to", "above 0"]),
        (["--decide", "-1"], ["at least 0"]),
    ],
)
def test_wrong_requests(cli, finished, words, saying):
    cli.refuses("smooth", finished, *words, saying=saying)


def test_up_to_needs_a_tolerance(cli, work):
    config = work / "config.yaml"
    config.write_text(re.sub(r"    (tolerance|up_to): .*\n", "", config.read_text()))
    cli.refuses("smooth", work, "--up-to", "1", saying=["--up-to", "--tolerance"])


# ---- curves


def write_ledger(path, header, radii):
    rows = [SmoothedVerdict(i, 1, 1, Status.certified, r, (0, 1), (0, 1), 0.1) for i, r in enumerate(radii)]
    with SmoothedLedger(path, {"variant": "dense", "sigma": 0.25, "seed": 0, **header}) as written:
        written.append(rows)
    return path


def test_implied_radii_share_an_axis_with_bounds_and_are_labelled(cli, tmp_path):
    l2 = write_ledger(tmp_path / "l2.jsonl", {"norm": "l2", "pixels": 100}, [0.4, 0.8])
    l1 = write_ledger(tmp_path / "l1.jsonl", {"norm": "l1", "pixels": 100, "noise": "uniform"}, [0.4, 0.8])
    bounds = write_run(tmp_path / "linf", count=10, eps=(0.1,)) / "certificates" / "dense" / "eps-0.1.jsonl"
    with pytest.raises(InputError, match="one chart per norm.*--norm"):
        reports.read_curves([l2, l1])
    curves = {curve.label: curve for curve in reports.read_curves([l2, l1, bounds], "linf")}
    assert {curve.norm for curve in curves.values()} == {"linf"} and len(curves) == 3
    (from_l2,) = (curve for label, curve in curves.items() if label.endswith("implied by ℓ2"))
    (from_l1,) = (curve for label, curve in curves.items() if label.endswith("implied by ℓ1"))
    assert [point.eps for point in from_l2.points[1:]] == [implied_radius(r, "l2", "linf", 100) for r in (0.4, 0.8)]
    assert [point.eps for point in from_l1.points[1:]] == pytest.approx([0.004, 0.008])
    own = reports.read_curves([l2], "l2")[0]  # nothing is implied in its own norm
    assert own.implied == "" and "implied" not in own.label and own.points[-1].eps == 0.8
    assert cli("curve", l2, bounds, "-o", tmp_path / "c.png", "--norm", "linf") == 0
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert any("implied by ℓ2" in row["network"] for row in rows) and {row["norm"] for row in rows} == {"linf"}
    cli.refuses("curve", l2, "-o", tmp_path / "d.png", "--norm", "l3", saying=["--norm", "linf, l2 or l1"])
    old = write_ledger(tmp_path / "old.jsonl", {"norm": "l2"}, [0.4])
    cli.refuses("curve", old, "-o", tmp_path / "d.png", "--norm", "linf", saying=["pixels", "older version"])
