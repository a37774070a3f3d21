"""Reports compare and average what is about the same images, and say where images that were asked for are not there."""

from __future__ import annotations

import random
import re

import pytest
import yaml

from certprune import reports
from certprune.data import DATASETS, load_data
from certprune.reports.asked import PUBLISHED, asked_count, needed_images, split_size
from certprune.reports.notes import definitions
from certprune.reports.study_tests import compare
from tests.run_folder import config_of, verdict, write_ledger, write_stage

PLANS = {
    "score": {"criterion": "score", "budget": "uniform", "sparsity": 0.99},
    "magnitude": {"criterion": "magnitude", "budget": "uniform", "sparsity": 0.99},
    "score-gradual": {"criterion": "score", "budget": "uniform", "sparsity": 0.99, "schedule": "gradual"},
    "magnitude-gradual": {"criterion": "magnitude", "budget": "uniform", "sparsity": 0.99, "schedule": "gradual"},
}


def write(folder, words, seed=0, count=10, split="test", data="mnist", start=None, **header):
    """A run; ``words``: a letter for each image of each network, c(ertified) or u(nknown), from its ``start`` on."""
    config = {**config_of("r", seed, eps=(0.1,)), "data": {"name": data}}
    config["variants"] = [{**PLANS[name], "name": name} for name in words]
    config["certify"] |= {"count": count, "split": split}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text("{}")
    for name, letters in words.items():
        write_stage(folder / name / "finetune", 0.99, 1, 0.8, random.Random(0))
        first = (start or {}).get(name, 0)
        notes = {"seed": seed, "data": data, "split": split, "norm": "linf", **header.get(name, {})}
        rows = [
            verdict(first + place, {"c": "certified", "u": "unknown"}[letter], 0.1, "ibp", notes["norm"])
            for place, letter in enumerate(letters)
        ]
        write_ledger(folder, name, 0.1, rows, **notes)
    return reports.read_run(folder)


def undecided(run):
    return [line for line in run.missing if "decided" in line]


PART = {"score": "cc" + 8 * "u", "magnitude": "cc"}  # the same verdicts on the images that both have
APART = ({"score": "cc", "magnitude": "uu"}, {"magnitude": 5})  # no image is shared


@pytest.mark.parametrize(("words", "start"), [(PART, None), APART], ids=["part", "apart"])
def test_a_network_with_other_images_is_neither_compared_nor_averaged(words, start, tmp_path):
    runs = [write(tmp_path / str(seed), words, seed, start=start) for seed in (0, 1)]
    alone = reports.differences(runs[:1])
    assert [(gap.pairs, gap.certified.value) for gap in alone] == ([(2, 0.0)] if start is None else [])
    assert reports.differences(runs) == []
    assert [row.variant for row in reports.aggregate(runs)] == ["score"]
    (family,) = reports.families_of(runs)
    gap = family.tables[0].gap(0.99, "uniform").cells
    assert gap.seeds == () and gap.rates["certified"] is None
    rows = {row.variant.name: row.cells.seeds for row in family.tables[0].rows}
    assert rows == {"score": (0, 1), "magnitude": ()}
    (section,) = reports.sections_of(runs, 0.1)
    assert [row.network.name for row in section.rows] == ["score"]
    assert "seed 0: magnitude: at eps 0.1 only 2 of 10 images are decided." in family.missing or start


def test_a_seed_that_is_not_whole_is_dropped_and_said(tmp_path):
    whole = write(tmp_path / "0", {"score": 10 * "c", "magnitude": 6 * "c" + 4 * "u"})
    runs = [whole, write(tmp_path / "1", PART, 1)]
    (gap,) = reports.differences(runs)
    assert (gap.pairs, gap.certified.value) == (1, pytest.approx(0.4))
    seeds = {row.variant: (row.seeds, row.n) for row in reports.aggregate(runs)}
    assert seeds == {"score": (2, 10), "magnitude": (1, 10)}
    assert undecided(whole) == [] and undecided(runs[1]) == ["magnitude: at eps 0.1 only 2 of 10 images are decided."]


def test_differences_are_over_the_images_that_both_have(tmp_path):
    """Magnitude was certified on four images more than were asked for, on which it does better."""
    runs = [
        write(tmp_path / str(seed), {"score": 5 * "c" + "u" * 5, "magnitude": 5 * "c" + "u" * 5 + "cccc"}, seed)
        for seed in (0, 1)
    ]
    (gap,) = reports.differences(runs)
    assert (gap.pairs, gap.certified.value) == (2, 0.0)
    cells = reports.families_of(runs)[0].tables[0].gap(0.99, "uniform").cells
    assert cells.each["certified"] == (0.0, 0.0) and cells.n == 10
    assert undecided(runs[0]) == []


@pytest.mark.parametrize("other", [{"norm": "l2"}, {"split": "validation"}])
def test_ledgers_of_another_norm_or_split_are_not_paired(other, tmp_path):
    words = {"score": 10 * "c", "magnitude": 10 * "u"}
    runs = [write(tmp_path / str(seed), words, seed, magnitude=other) for seed in (0, 1)]
    assert reports.differences(runs) == [] and reports.differences(runs[:1]) == []
    assert reports.families_of(runs)[0].tables[0].gap(0.99, "uniform").cells.seeds == ()
    rows = reports.sections_of(runs, 0.1)[0].groups[0.99]
    assert compare(0.99, *rows) is None


def test_mcnemar_is_over_the_images_that_the_comparison_names(tmp_path):
    """Seed 1 has six images; on the other four of seed 0, which seed 1 lacks, only the first network is certified."""
    runs = [
        write(tmp_path / "0", {"score": 10 * "c", "magnitude": "c" * 6 + "u" * 4}, 0),
        write(tmp_path / "1", {"score": 6 * "c", "magnitude": "ccuccc"}, 1),
    ]
    rows = {row.network.name: row for row in reports.sections_of(runs, 0.1)[0].groups[0.99]}
    found = compare(0.99, rows["score"], rows["magnitude"])
    assert found.images == 6
    assert [tuple(seed)[:3] for seed in found.seeds] == [(0, 0, 0), (1, 1, 0)]


def test_networks_are_compared_by_criterion_alone(tmp_path):
    words = {"score": 5 * "c" + 5 * "u", "magnitude": 5 * "c" + 5 * "u", "score-gradual": 10 * "c"}
    run = write(tmp_path / "0", {key: words[key] for key in ("score-gradual", "score", "magnitude")})
    assert [gap.variant for gap in reports.differences([run])] == ["score"]
    found = reports.families_of([run])
    gap = found[0].tables[0].gap(0.99, "uniform")
    assert (gap.first.name, gap.cells.rates["certified"].value) == ("score", 0.0)
    assert "| CROWN-IBP | 0.1 | 0.0 |" in reports.families_page(found, "T", "c")


def test_a_summary_of_gradual_pruning_says_so(tmp_path):
    run = write(tmp_path / "0", {"score-gradual": 10 * "c", "magnitude-gradual": 5 * "c" + 5 * "u", "magnitude": "u"})
    found = reports.families_of([run])
    gap = found[0].tables[0].gap(0.99, "uniform")
    assert (gap.second.name, gap.cells.rates["certified"].value) == ("magnitude-gradual", 0.5)
    assert "| CROWN-IBP, gradual | 0.1 | 0.0 |" in reports.families_page(found, "T", "c")


@pytest.mark.parametrize(("count", "whole"), [(10, "10"), (None, "10,000")])
def test_ledgers_that_were_all_cut_alike_are_not_whole(count, whole, tmp_path):
    run = write(tmp_path / "0", {"score": "ccu", "magnitude": "cuu"}, count=count)
    said = [f"{name}: at eps 0.1 only 3 of {whole} images are decided." for name in ("score", "magnitude")]
    assert undecided(run) == said
    page = reports.write_report(run.folder).read_text()
    assert f"certified on 3 of {whole} test images" in page and all(line in page for line in said)
    (gap,) = reports.differences([run, write(tmp_path / "1", {"score": "ccu", "magnitude": "cuu"}, 1, count)])
    assert gap.pairs == 2  # none has more than the other


def test_other_methods_tables_say_that_images_are_not_there(tmp_path):
    folder = write(tmp_path / "0", {"score": 10 * "c", "magnitude": 10 * "u"}).folder
    others = {}
    for name in ("score", "magnitude"):
        others[name] = folder / "certificates" / name / "eps-0.1-alpha-crown.jsonl"
        text = others[name].with_name("eps-0.1.jsonl").read_text()
        others[name].write_text(text.replace("ibp+crown-ibp+crown", "alpha-crown"))
    said = "Not every network is certified on the 10 images that the recipe asks for."
    assert said not in reports.write_report(folder).read_text()
    others["score"].write_text("".join(others["score"].read_text().splitlines(keepends=True)[:5]))
    assert said in reports.write_report(folder).read_text()
    assert undecided(reports.read_run(folder)) == []  # nothing that the recipe asks for


def test_images_of_ones_own_are_measured_by_all_ledgers(tmp_path):
    run = write(tmp_path / "0", {"score": "ccu", "magnitude": "cuuu"}, count=None, data="folder")
    assert undecided(run) == ["score: at eps 0.1 only 3 of 4 images are decided."]
    assert needed_images(None, [frozenset({1, 2}), frozenset({5})]) == {1, 2}
    assert needed_images(2, [frozenset({0, 5, 6}), frozenset({0, 1})]) == {0, 1}
    assert needed_images(2, [frozenset({7})]) == {7}


@pytest.mark.parametrize("options", [{}, {"test": 0.3, "validation": 0.15}])
@pytest.mark.parametrize("name", ["digits", "mnist-5k"])
def test_sizes_of_splits_are_those_of_the_data(name, options):
    data = load_data(name, **options)
    for split in ("train", "validation", "test"):
        assert split_size({"name": name, **options}, split) == len(getattr(data, split))


def test_published_sizes_are_those_that_the_data_sets_tell():
    for name, (train, test) in PUBLISHED.items():
        told = DATASETS[name].__doc__
        assert told.startswith(f"{train:,} " if isinstance(test, float) else f"{train:,} + {test:,} "), told


def test_what_a_recipe_asks_for():
    config = {"data": {"name": "mnist"}, "certify": {"count": 20_000, "smoothing": {"count": 500}}}
    assert asked_count(config) == 10_000 and asked_count(config, config["certify"]["smoothing"]) == 500
    assert asked_count({**config, "certify": {"split": "validation"}}) == 6_000
    assert asked_count({"data": {"name": "imagenet"}}) is None and asked_count({}) is None
    assert asked_count({"data": {"name": "svhn", "with_extra": True}, "certify": {"split": "train"}}) is None


@pytest.mark.parametrize(
    ("split", "said"), [("validation", "validation images also chose the epoch"), ("train", "that the networks were")]
)
def test_pages_do_not_call_other_images_untouched(split, said, tmp_path):
    words = {"score": 10 * "c", "magnitude": 5 * "c" + 5 * "u"}
    run = write(tmp_path / "0", words, split=split)
    reports.write_study([run], tmp_path / "p.md", "T", "c", 0.1)
    texts = (
        (tmp_path / "p.md").read_text(),
        reports.families_page(reports.families_of([run]), "T", "c"),
        definitions([run]),
    )
    for text in texts:
        assert said in text
        assert not re.search(r"[Nn]o choice is made|test images|used for nothing else", text)
    assert ("these choices" in texts[0]) == (split == "validation")


def test_pages_about_test_images_say_that_these_chose_nothing(tmp_path):
    run = write(tmp_path / "0", {"score": 10 * "c", "magnitude": 5 * "c" + 5 * "u"})
    reports.write_study([run], tmp_path / "p.md", "T", "c", 0.1)
    page = (tmp_path / "p.md").read_text()
    assert "the test images were used once, for this page." in page and "around a test image, on average" in page
    assert "No choice is made on the images that the tables report." in definitions([run])
    assert "share of test images" in reports.families_page(reports.families_of([run]), "T", "c")
    for text in (page, definitions([run])):
        assert "flatter" not in text
