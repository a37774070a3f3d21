"""Several recipes side by side: every figure below is counted by hand from a dozen images and three seeds."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from certifiers.errors import InputError
from certifiers.smoothing import SmoothedLedger, SmoothedVerdict, certified_radius
from certifiers.smoothing.bounds import lower_confidence_bounds
from certifiers.verdict import Status
from certprune.cli import app
from certprune.reports import families_csv, families_of, families_page, read_run
from certprune.reports.look import order
from tests.run_folder import config_of, sparsity_record, verdict, write_ledger

T2 = 4.302652729911275  # the 97.5 % quantile of Student's t with 2 degrees of freedom
PRUNED = [
    {"criterion": criterion, "sparsity": sparsity, "budget": budget, "name": f"{criterion}-{budget}-{sparsity:g}"}
    for criterion in ("score", "magnitude")
    for budget in ("erk", "uniform")
    for sparsity in (0.9, 0.99)
]
VARIANTS = [{"dense": True, "name": "dense"}, *PRUNED]


def write(folder, counts, *, seed=0, name="crown", objective=("crown_ibp", 0.1), count=20, certify=None):
    """A run whose networks have ``counts[variant]`` = (right, not broken, certified, by IBP) of ``count`` images."""
    folder.mkdir(parents=True)
    config = config_of(name, seed, eps=(objective[1],))
    config["objective"] = {"name": objective[0], "eps": objective[1]}
    config["variants"], config["certify"] = VARIANTS, {**config["certify"], "count": count, **(certify or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"stages": {"pretrain": {"seconds": 36.0}}}))
    for stage, seconds in {"pretrain": 36.0, **{f"{name}/finetune": 10.0 for name in counts}}.items():
        (folder / stage).mkdir(parents=True)
        record = {"epochs": 1, "selected_epoch": 1, "seconds": seconds, "sparsity": sparsity_record(0.0)}
        (folder / stage / "stage.json").write_text(json.dumps(record))
    for variant, (clean, attack, certified, ibp) in counts.items():
        rows = []
        for index in range(count):
            if index < certified:
                rows.append(verdict(index, "certified", objective[1], "ibp" if index < ibp else "crown"))
            else:
                word = "unknown" if index < attack else "falsified" if index < clean else "misclassified"
                rows.append(verdict(index, word, objective[1], "crown"))
        write_ledger(folder, variant, objective[1], rows, seed=seed)
    return folder


MANY = 10**6


def counts_for(radius, sigma):
    """A number of successes that proves this radius, or a little more; and what it proves."""
    won = range(MANY // 2, MANY + 1, 500)
    radii = [certified_radius(float(p), sigma) for p in lower_confidence_bounds(won, MANY, 0.001)]
    place = next(i for i, proven in enumerate(radii) if proven >= radius)
    return won[place], radii[place]


def smooth(folder, variant, radii, *, sigma=0.25, suffix=""):
    """A smoothing ledger with one image for each radius: None abstains, a negative one is a wrong prediction's."""
    path = folder / "certificates" / variant / f"smoothing-{sigma:g}{suffix}.jsonl"
    header = {"model": variant, "data": "mnist-5k", "split": "test", "norm": "l2", "sigma": sigma, "n0": 10}
    with SmoothedLedger(path, header | {"n": MANY, "alpha": 0.001, "seed": 0}) as ledger:
        for index, radius in enumerate(radii):
            status = "abstained" if radius is None else "certified" if radius > 0 else "misclassified"
            prediction = None if radius is None else int(radius < 0)
            won, proven = counts_for(abs(radius or 0.0), sigma)
            counts, selection = (won, MANY - won), (10, 0)
            if prediction:
                counts, selection = counts[::-1], selection[::-1]
            row = SmoothedVerdict(index, 0, prediction, Status(status), proven, counts, selection, 0.1)
            ledger.append([row])


def table_of(page, heading):
    """The cells of the first table below a heading, by the row's first cell (or first few)."""
    part = page[page.index(f"## {heading}") :]
    lines = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.fixture
def runs(tmp_path):
    """CROWN-IBP with three seeds, of which the last has no magnitude at 99 % uniform, and IBP with one seed."""
    folders = []
    for seed, (dense, score, magnitude) in enumerate([(16, 10, 8), (14, 12, 8), (12, 8, 2)]):
        counts = {
            "dense": (18, 17, dense, dense - 2),
            "score-uniform-0.99": (14, 13, score, 4),
            "score-erk-0.99": (15, 14, 13, 13),
        }
        if seed < 2:
            counts["magnitude-uniform-0.99"] = (12, 11, magnitude, 0)
        folders.append(write(tmp_path / f"crown-{seed}", counts, seed=seed))
    folders.append(write(tmp_path / "ibp-0", {"dense": (16, 15, 14, 14)}, name="ibp", objective=("ibp", 0.1)))
    return folders


def test_means_and_intervals_over_seeds(runs):
    crown, ibp = families_of([read_run(run) for run in runs])
    assert (crown.title, ibp.title) == ("CROWN-IBP, eps 0.1", "IBP, eps 0.1")
    (table,) = crown.tables
    dense = table.dense.cells
    assert dense.each["certified"] == (0.8, 0.7, 0.6) and dense.seeds == (0, 1, 2) and dense.n == 20
    # mean 0.7, standard deviation 0.1 over three seeds
    half = T2 * 0.1 / 3**0.5
    certified = dense.rates["certified"]
    assert (certified.value, certified.lower, certified.upper) == pytest.approx((0.7, 0.7 - half, 0.7 + half))
    assert dense.each["ibp"] == (0.7, 0.6, 0.5)  # certified by interval bounds alone: two images fewer of 20
    assert dense.rates["clean"].value == pytest.approx(0.9) and dense.rates["attack"].value == pytest.approx(0.85)
    alone = ibp.tables[0].dense.cells.rates["certified"]
    assert (alone.value, alone.lower, alone.upper) == (0.7, None, None)


def test_differences_are_paired_by_seed_and_only_where_both_are(runs):
    crown, ibp = families_of([read_run(run) for run in runs])
    gap = crown.tables[0].gap(0.99, "uniform").cells
    assert gap.seeds == (0, 1) and gap.each["certified"] == pytest.approx((0.1, 0.2))
    # mean 0.15, standard deviation 0.0707 over two seeds: half-width t(1) * 0.05
    assert gap.rates["certified"].value == pytest.approx(0.15)
    assert gap.rates["certified"].upper == pytest.approx(0.15 + 12.706204736 * 0.05)
    missing = ibp.tables[0].gap(0.99, "uniform").cells
    assert missing.seeds == () and missing.rates["certified"] is None
    assert crown.tables[0].gap(0.5, "uniform") is None
    assert {gap.label for gap in crown.tables[0].gaps} == {"learned scores − least magnitude"}


def test_page_shows_every_figure_and_a_dash_for_what_is_missing(runs):
    page = families_page(families_of([read_run(run) for run in runs]), "Title", "the command")
    assert page.startswith("# Title\n\nMade by `the command`.")
    first, second = table_of(page, "Dense networks")
    assert (first["Objective"], first["eps"], first["Seeds"]) == ("CROWN-IBP", "0.1", "3")
    assert first["Certified %"] == "70.0 [45.2, 94.8]" and first["IBP certified %"] == "60.0 [35.2, 84.8]"
    assert first["Images"] == "20 mnist-5k test" and first["Epochs"] == "12 + 4 + 6"
    assert first["Pretraining"] == "36 s"
    assert first["All training"] == "1 min 13 s"  # (76 + 76 + 66) / 3
    assert (second["Objective"], second["Certified %"]) == ("IBP", "70.0")
    gaps = table_of(page, "Learned scores minus least magnitude at 99 %, uniform budget")
    assert gaps[0]["Certified"].startswith("+15.0 [") and gaps[0]["Clean"] == "+10.0 [+10.0, +10.0]"
    assert (gaps[1]["Certified"], gaps[1]["Seeds"]) == ("–", "0")
    rows = {row["Network"]: row for row in table_of(page, "CROWN-IBP, eps 0.1")}
    assert rows["learned scores, ERK, 99 %"]["Certified %"] == "65.0 [65.0, 65.0]"
    assert rows["least magnitude, uniform, 99 %"]["Seeds"] == "2"
    assert rows["learned scores, ERK, 90 %"] == {
        **dict.fromkeys(rows["dense"], "–"),
        "Network": "learned scores, ERK, 90 %",
        "Seeds": "0",
    }
    assert "seed 2: magnitude-uniform-0.99: training has not begun." in page
    assert "nan" not in page


def test_csv_has_each_figure_at_full_precision(runs):
    rows = list(csv.DictReader(io.StringIO(families_csv(families_of([read_run(run) for run in runs])))))
    assert len(rows) == 2 * (9 + 4) * 4  # families, networks and pairs, measures
    (row,) = [
        r
        for r in rows
        if (r["recipe"], r["network"], r["measure"], r["figure"]) == ("crown", "dense", "certified", "accuracy")
    ]
    assert float(row["mean"]) == pytest.approx(0.7) and row["each"] == "0.8 0.7 0.6" and row["images"] == "20"
    (gap,) = [r for r in rows if (r["recipe"], r["figure"], r["budget"]) == ("ibp", "difference", "uniform")
              and (r["sparsity"], r["measure"]) == ("0.99", "attack")]  # fmt: skip
    assert (gap["mean"], gap["seeds"], gap["network"]) == ("", "0", "score-uniform-0.99 - magnitude-uniform-0.99")


def test_ibp_is_unknown_unless_it_was_asked_first(tmp_path):
    folder = write(tmp_path / "r", {}, certify={"methods": ["crown"]})
    rows = [verdict(index, "certified", 0.1, "crown") for index in range(4)]
    path = write_ledger(folder, "dense", 0.1, rows)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(lines[0]) | {"method": "crown"}) + "\n", *lines[1:]]))
    (family,) = families_of([read_run(folder)])
    rates = family.tables[0].dense.cells.rates
    assert rates["ibp"] is None and rates["certified"].value == 1.0


def test_ledgers_of_unequal_length_are_not_paired(tmp_path):
    folder = write(tmp_path / "r", {"score-erk-0.9": (9, 9, 9, 9)})
    write_ledger(folder, "magnitude-erk-0.9", 0.1, [verdict(0, "certified", 0.1, "ibp")])
    (family,) = families_of([read_run(folder)])
    assert family.tables[0].gap(0.9, "erk").cells.seeds == ()
    assert any("only 1 of 20 images" in line for line in family.missing)


def test_recipes_of_one_objective_are_told_apart(tmp_path):
    counts = {"dense": (9, 9, 9, 9)}
    folders = [
        write(tmp_path / "a", counts, name="a"),
        write(tmp_path / "b", counts, name="b", certify={"attack_steps": 7}),
    ]
    found = families_of([read_run(folder) for folder in folders])
    assert [family.title for family in found] == ["CROWN-IBP, eps 0.1 (a)", "CROWN-IBP, eps 0.1 (b)"]
    names = [row["Objective"] for row in table_of(families_page(found, "T", "c"), "Dense networks")]
    assert names == ["CROWN-IBP (a)", "CROWN-IBP (b)"]


def test_a_null_setting_is_the_same_recipe_as_none(tmp_path):
    counts = {"dense": (9, 9, 9, 9)}
    folders = [write(tmp_path / "a", counts), write(tmp_path / "b", counts, seed=1, certify={"smoothing": None})]
    assert [len(family.runs) for family in families_of([read_run(folder) for folder in folders])] == [2]


def test_what_makes_the_same_weights_faster_is_the_same_recipe(tmp_path):
    counts, usual = {"dense": (9, 9, 9, 9)}, {"bf16": False, "accumulate": 1}
    speeds = [None, {**usual, "compile": True, "channels_last": False}, {**usual, "accumulate": 2, "compile": True}]
    folders = [write(tmp_path / str(seed), counts, seed=seed) for seed in range(3)]
    for folder, speed in zip(folders, speeds, strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | ({"speed": speed} if speed else {})))
    found = families_of([read_run(folder) for folder in folders])
    assert [[run.seed for run in family.runs] for family in found] == [[0, 1], [2]]


def test_runs_of_a_family_need_not_hold_the_same_networks(tmp_path):
    whole = write(tmp_path / "0", {"dense": (10, 9, 8, 7), "score-erk-0.9": (10, 8, 6, 4)})
    part = write(tmp_path / "1", {"dense": (12, 11, 10, 9)}, seed=1, certify={"count": 7})
    content = yaml.safe_load((part / "config.yaml").read_text())
    content["variants"] = content["variants"][:1]
    (part / "config.yaml").write_text(yaml.safe_dump(content))
    (family,) = families_of([read_run(part), read_run(whole)])
    rows = {row.variant.name: row for row in family.tables[0].rows}
    assert len(rows) == len(VARIANTS)
    assert rows["dense"].cells.rates["certified"].value == pytest.approx((8 + 10) / 40)
    assert rows["dense"].cells.seeds == (1, 0)
    assert rows["score-erk-0.9"].cells.rates["certified"].value == pytest.approx(6 / 20)
    assert rows["score-erk-0.9"].cells.seeds == (0,)


def test_networks_of_one_name_made_otherwise_are_another_family(tmp_path):
    folders = [write(tmp_path / str(seed), {"score-erk-0.9": (10, 8, 6, 4)}, seed=seed) for seed in (0, 1)]
    content = yaml.safe_load((folders[1] / "config.yaml").read_text())
    content["variants"][1]["sparsity"] = 0.8
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(content))
    assert [len(family.runs) for family in families_of([read_run(folder) for folder in folders])] == [1, 1]


def test_a_seed_given_twice_is_refused(tmp_path):
    folders = [write(tmp_path / name, {"dense": (9, 9, 9, 9)}) for name in "ab"]
    with pytest.raises(InputError, match="same seed 0"):
        families_of([read_run(folder) for folder in folders])
    with pytest.raises(InputError, match="No run was given"):
        families_of([])


def test_nothing_certified_yet(tmp_path):
    page = families_page(families_of([read_run(write(tmp_path / "r", {}))]), "T", "c")
    assert "Nothing is certified yet." in page and "dense: training has not begun." in page


def test_command_writes_markdown_and_csv(runs, tmp_path):
    out = tmp_path / "objectives.md"
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--title", "T", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith("# T\n") and out.with_suffix(".csv").read_text().startswith("family,")
    assert "CROWN-IBP, eps 0.1: seeds 0, 1, 2" in result.output
    bad = CliRunner().invoke(app, ["compare", str(runs[0]), "--budget", "erg", "-o", str(out)])
    assert bad.exit_code == 2 and "erk" in bad.output


def test_rows_are_in_the_order_of_every_report(runs):
    (table,) = families_of([read_run(runs[0])])[0].tables
    from certprune.reports.rows import network

    keys = [order(network(row.variant)) for row in table.rows]
    assert keys == sorted(keys) and table.rows[0].label == "dense"


@pytest.fixture
def noisy(tmp_path):
    """Gaussian noise: of four images, seed 0 certifies two at 0.25 and one at 0.5; seed 1 three and two."""
    folders = []
    plans = {0: [0.3, 0.6, -0.4, None], 1: [0.3, 0.6, 0.7, None]}
    for seed, radii in plans.items():
        folder = write(tmp_path / f"gaussian-{seed}", {}, seed=seed, name="gaussian", certify={"eps": []})
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["objective"] = {"name": "gaussian", "sigma": 0.25}
        config["certify"] |= {"eps": None, "smoothing": {"sigma": 0.25, "count": 4, "radii": [0.0, 0.25, 0.5]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        smooth(folder, "dense", radii)
        smooth(folder, "score-uniform-0.99", [0.6, 0.6, 0.1, None])
        smooth(folder, "magnitude-uniform-0.99", [0.1, 0.1, -0.1, None])
        smooth(folder, "dense", [0.9] * 4, suffix="-n=1000")  # by other settings than the recipe's: not shown
        folders.append(folder)
    return folders


def test_smoothed_families_have_a_column_for_each_radius(noisy, runs):
    found = families_of([read_run(folder) for folder in noisy + runs])
    (table,) = found[0].tables
    assert (found[0].title, table.source.kind) == ("Gaussian noise, sigma 0.25", "smoothing")
    each = table.dense.cells.each
    assert each == {"r=0": (0.5, 0.75), "r=0.25": (0.5, 0.75), "r=0.5": (0.25, 0.5)}
    gap = table.gap(0.99, "uniform").cells
    assert gap.each == {"r=0": (0.25, 0.25), "r=0.25": (0.5, 0.5), "r=0.5": (0.5, 0.5)}
    page = families_page(found, "T", "c")
    assert "| Objective | sigma | r = 0 % | r = 0.25 % | r = 0.5 % |" in page
    assert "| Gaussian noise | 0.25 | +25.0 [+25.0, +25.0] | +50.0 [+50.0, +50.0] |" in page
    assert "ℓ2 radii by randomized smoothing with sigma 0.25 (n0 10, n 1,000,000, alpha 0.001); mnist-5k test" in page
    rows = [row for row in csv.DictReader(io.StringIO(families_csv(found))) if row["certified_by"] == "smoothing"]
    assert len(rows) == (9 + 4) * 3 and {row["level"] for row in rows} == {"0.25"}


def test_smoothing_that_is_not_there_is_said(noisy):
    folder = noisy[0]
    (folder / "certificates" / "score-uniform-0.99" / "smoothing-0.25.jsonl").unlink()
    (folder / "score-uniform-0.99" / "finetune").mkdir(parents=True)
    (folder / "score-uniform-0.99" / "finetune" / "stage.json").write_text("{}")
    smooth(folder, "score-erk-0.9", [0.5])
    missing = read_run(folder).missing
    for words in ("score-uniform-0.99: not certified yet by smoothing", "score-erk-0.9: by smoothing"):
        assert any(line.startswith(words) and "sigma 0.25" in line for line in missing), missing
    assert any("only 1 of 4 images" in line for line in missing)
