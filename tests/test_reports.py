"""Reports against figures computed by hand, on runs that are finished, cut off, damaged or repeated."""

import ast
import csv
import io
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

from certifiers.errors import InputError
from certprune import reports
from certprune.reports.compare import paired_rate
from certprune.reports.curves import accuracy_at
from certprune.reports.look import Network, labels, percent, spread, styles, ticks
from certprune.reports.rows import Rate, duration, points
from certprune.reports.seeds import mean_rate
from tests.run_folder import config_of, verdict, write_ledger, write_run, write_stage

LOG = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of five networks at four eps; read it only."""
    return write_run(tmp_path_factory.mktemp("runs") / "demo", count=120)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "demo"))


@pytest.fixture
def small(tmp_path):
    """Two networks, ten images, one eps; every figure below is counted by hand from these lines."""
    folder = tmp_path / "small"
    folder.mkdir()
    config = config_of("small", eps=(0.1,))
    config["variants"] = [
        {"dense": True, "name": "dense"},
        {"criterion": "score", "sparsity": 0.99, "budget": "erk", "name": "score-erk-0.99"},
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text("{}")
    endings = {
        "dense": "certified certified certified certified certified certified unknown falsified misclassified timeout",
        "score-erk-0.99": "certified certified certified certified unknown unknown certified falsified misclassified "
        "misclassified",
    }
    for name, words in endings.items():
        rows = [verdict(index, word, 0.1, "crown") for index, word in enumerate(words.split())]
        write_ledger(folder, name, 0.1, rows, sparsity=0.0, seed=0)
    return folder


def test_summary_counts_by_hand(small):
    dense, pruned = reports.summary_rows(reports.read_run(small))
    assert (dense.variant, pruned.variant) == ("dense", "score-erk-0.99")
    assert (dense.clean.value, dense.attack.value, dense.certified.value) == (0.9, 0.8, 0.6)
    assert (pruned.clean.value, pruned.attack.value, pruned.certified.value) == (0.8, 0.7, 0.5)
    # Wilson: (p + z^2/2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2/n)
    z, n, p = 1.959964, 10, 0.6
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert dense.certified.lower == pytest.approx(middle - half, abs=1e-6)
    assert dense.certified.upper == pytest.approx(middle + half, abs=1e-6)
    assert dense.certification_seconds == pytest.approx(0.1)
    assert (dense.n, dense.eps, dense.norm) == (10, 0.1, "linf")


def test_page_shows_the_figures_of_the_ledgers(small):
    page = reports.write_report(small).read_text()
    text = re.sub(r"<[^>]*>", "|", page)
    assert re.search(r"dense\|+84", text) is None
    row = re.search(r'<tr><th scope="row" class="left">dense</th>(.*?)</tr>', page)[1]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
    low, high = "31.3", "83.2"  # Wilson at 6 of 10
    assert cells[2:6] == ["10", "90.0 [59.6, 98.2]", "80.0 [49.0, 94.3]", f"60.0 [{low}, {high}]"]
    assert f"certified at eps 0.1 [{low}, {high}]" in page
    # The bars: 6 proven, 2 open (one of them timed out), 1 broken, 1 wrong; each width is a count.
    bar = re.search(r'<div>dense</div><div class="bar">(.*?)</div>', page)[1]
    assert [int(count) for count in re.findall(r"flex:(\d+) 0 0", bar)] == [6, 1, 1, 1, 1]
    # Paired: image 6 is proven for the pruned network alone, images 4 and 5 for the dense one alone.
    assert re.search(r"<td[^>]*>−10.0 <span", page)
    assert re.search(r'data-heading="Only the first">1</td><td data-heading="Only the second">2</td>', page)


def test_page_repeats_every_summary_row(finished):
    page = reports.write_report(finished, finished.parent / "page.html").read_text()
    rows = reports.summary_rows(reports.read_run(finished))
    assert len(rows) == 20
    for row in rows:
        for rate in (row.clean, row.attack, row.certified):
            assert f">{100 * rate.value:.1f} <span" in page


class Tags(HTMLParser):
    """Checks that tags are balanced, and collects ids and references."""

    VOID = ("meta", "br", "hr", "img", "input", "link")
    CLOSED = ("path", "circle", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.names = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "srcset", "action", "data", "xlink:href"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def test_page_is_whole_and_fetches_nothing(finished, tmp_path):
    other = write_run(tmp_path / "second", name="second", seed=1, count=60)
    for folders in ([finished], [finished, other]):
        page = reports.write_report(folders, tmp_path / "page.html").read_text()
        assert not re.search(r"https?:|//www|@import|url\(|javascript:|\bsrc=", page)
        tags = Tags()
        tags.feed(page)
        assert tags.open == []
        assert not tags.names & {"script", "link", "iframe", "object", "img", "base"}
        assert len(set(tags.ids)) == len(tags.ids)
        assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
        charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(charts) > 10
        for chart in charts:
            ElementTree.fromstring(chart)
        assert "nan" not in re.sub(r"<[^>]*title.*?>", "", " ".join(charts)).lower()


def test_page_escapes_what_users_name(run, tmp_path):
    nasty = '<script>alert("x")</script>&'
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"name": nasty, "data": {"name": nasty}, "model": {"name": nasty}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "provenance.json").write_text(json.dumps({"command": nasty, "hardware": {nasty: nasty}, "x": [nasty]}))
    rows = [verdict(0, "certified", 0.1, nasty), verdict(1, "unknown", 0.1, nasty)]
    write_ledger(run, nasty.replace("/", "."), 0.1, rows)
    for folders in ([run], [run, write_run(tmp_path / "b", count=20)]):
        page = reports.write_report(folders, tmp_path / "page.html").read_text()
        assert "<script" not in page
        assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;" in page
        tags = Tags()
        tags.feed(page)
        assert tags.open == []


def test_unfinished_run_says_what_is_missing(run):
    shutil.rmtree(run / "magnitude-erk-0.99")
    shutil.rmtree(run / "certificates" / "magnitude-erk-0.99")
    shutil.rmtree(run / "certificates" / "score-erk-0.99")
    (run / "score-erk-0.99" / "finetune" / "stage.json").unlink()
    shutil.rmtree(run / "score-erk-0.95" / "finetune")
    (run / "certificates" / "dense" / "eps-0.15.jsonl").unlink()
    ledger = run / "certificates" / "dense" / "eps-0.1.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:31]) + '{"index": 3')
    (run / "provenance.json").unlink()
    view = reports.read_run(run)
    assert view.missing == [
        "provenance.json is missing.",
        "score-erk-0.95: prune is done, the next stage has not begun.",
        "score-erk-0.99: finetune is not finished (6 epochs on record).",
        "magnitude-erk-0.99: training has not begun.",
        "dense: not certified yet at eps 0.15.",
        "dense: at eps 0.1 only 30 of 120 images are decided.",
    ]
    page = reports.write_report(run).read_text()
    assert "This run is not finished." in page
    assert "do not compare them yet" in page
    assert all(line in page for line in view.missing)


def test_run_that_has_only_a_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text("name: bare\nobjective: {name: ibp, eps: 0.1}\nvariants: [{dense: true}]\n")
    page = reports.write_report(tmp_path).read_text()
    assert "Nothing is certified yet" in page
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == []
    assert not (tmp_path / "curves.png").exists()


def test_contradicted_ledger_is_an_alarm_and_not_counted(run):
    path = run / "certificates" / "dense" / "eps-0.1.jsonl"
    path.write_text(path.read_text() + json.dumps({"contradiction": {"index": 7}}) + "\n")
    view = reports.read_run(run)
    assert len(view.alarms) == 1
    assert "contradicted" in view.alarms[0]
    assert view.variant("dense").ledger(0.1) is None
    assert "A certificate was contradicted." in reports.write_report(run).read_text()


def test_damaged_records_are_told_and_left_out(run):
    (run / "dense" / "finetune" / "stage.json").write_text("{")
    metrics = run / "pretrain" / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text() + "not json\n" + '{"epoch": 13, "train": null, "validation": {"loss": null}}\n'
    )
    (run / "certificates" / "dense" / "eps-0.1.jsonl").write_text("rubbish\n")
    missing = " ".join(reports.read_run(run).missing)
    assert "stage.json is not readable" in missing
    assert "metrics.jsonl holds a line that is not JSON" in missing
    assert "eps-0.1.jsonl cannot be read" in missing
    reports.write_report(run)


def test_other_methods_stand_apart(run):
    header = {"model": "m", "data": "mnist-5k", "split": "test", "eps": 0.1, "norm": "linf", "method": "alpha-crown"}
    from certifiers.verdict import Ledger

    with Ledger(run / "certificates" / "dense" / "eps-0.1-alpha-crown.jsonl", header) as ledger:
        ledger.append([verdict(index, "certified", 0.1, "alpha-crown") for index in range(4)])
    view = reports.read_run(run)
    assert view.variant("dense").ledger(0.1).method == "ibp+crown-ibp+crown"
    assert len(reports.summary_rows(view, 0.1)) == 5
    (other,) = reports.summary_rows(view, others=True)
    assert (other.method, other.n, other.certified.value) == ("alpha-crown", 4, 1.0)
    assert "alpha-crown, eps 0.1" in reports.write_report(run).read_text()


def test_main_eps_is_the_one_trained_for_else_the_commonest(run):
    assert reports.read_run(run).main_eps == 0.1
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["objective"]["eps"] = 0.3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "certificates" / "dense" / "eps-0.15.jsonl").unlink()
    assert reports.read_run(run).main_eps == 0.1  # the largest of those that all networks have


def test_report_leaves_the_files_of_the_run_folder(run):
    assert reports.write_report(run) == run / "report.html"
    summary = json.loads((run / "summary.json").read_text())
    assert [row["variant"] for row in summary["rows"][:2]] == ["dense", "score-erk-0.95"]
    assert summary["rows"][0]["certified"].keys() == {"value", "lower", "upper"}
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len((run / "curves.csv").read_text().splitlines()) == 1 + 5 * 5  # eps 0 and four more for five networks
    first = [(run / name).read_bytes() for name in ("report.html", "curves.png", "curves.csv")]
    reports.write_report([run])
    assert first == [(run / name).read_bytes() for name in ("report.html", "curves.png", "curves.csv")]


def test_report_errors(run, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        reports.write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="say where to write"):
        reports.write_report([run, run])
    with pytest.raises(InputError, match="No run was given"):
        reports.write_report([])
    with pytest.raises(InputError, match="is a folder"):
        reports.write_report(run, tmp_path)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not readable as YAML"):
        reports.read_run(run)
    (run / "config.yaml").write_text("just words")
    with pytest.raises(InputError, match="holds str"):
        reports.read_run(run)


def test_markdown_holds_the_rows(finished):
    rows = reports.summary_rows(reports.read_run(finished), eps=0.1)
    lines = reports.markdown_table(rows).splitlines()
    assert lines[0].startswith(
        "| Network | Sparsity | Weights kept | eps | Images | Clean % | Attack % | Certified % |"
    )
    assert len(lines) == 2 + len(rows)
    assert "| learned scores, 99 % | 99 % | 1,662 | 0.1 | 120 |" in lines[5]


def test_terminal_table_fits_eighty_columns(finished):
    view = reports.read_run(finished)
    for rows in (reports.summary_rows(view, eps=0.1), reports.summary_rows(view)):
        screen = Console(width=80, file=io.StringIO())
        screen.print(reports.rich_table(rows))
        text = screen.file.getvalue()
        assert "…" not in text
        assert text.count("magnitude") == sum(row.criterion == "magnitude" for row in rows)
    assert "eps 0.1 (linf), 120 images" in reports.rich_table(reports.summary_rows(view, eps=0.1)).title


def _seeds(tmp_path, count=3):
    return [
        reports.read_run(write_run(tmp_path / f"s{seed}", name=f"s{seed}", seed=seed, count=40))
        for seed in range(count)
    ]


def test_aggregate_is_the_t_interval_over_seeds(tmp_path):
    runs = _seeds(tmp_path)
    rows = reports.aggregate(runs, eps=0.1)
    assert [row.variant for row in rows][:3] == ["dense", "score-erk-0.95", "magnitude-erk-0.95"]
    values = [reports.summary_rows(run, 0.1)[0].certified.value for run in runs]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # the 97.5 % quantile of t with 2 degrees of freedom
    assert rows[0].certified.value == pytest.approx(mean)
    assert rows[0].certified.lower == pytest.approx(mean - half)
    assert rows[0].seeds == 3
    assert rows[0].each_certified == tuple(values)
    single = reports.aggregate(runs[:1], eps=0.1)[0]
    assert (single.certified.lower, single.certified.upper) == (None, None)
    assert "| dense | 0 % | 166,248 | 0.1 | 3 |" in reports.markdown_table(rows)


def test_interval_over_seeds_stays_a_fraction():
    assert mean_rate([1.0, 0.9]).upper == 1.0
    assert mean_rate([1.0, 0.9], bounded=False).upper > 1.0


def test_aggregate_refuses_what_is_not_one_recipe(tmp_path):
    runs = _seeds(tmp_path, 2)
    other = reports.read_run(write_run(tmp_path / "other", seed=5, count=20, eps=(0.1,)))
    with pytest.raises(InputError, match="differs from .* in certify"):
        reports.aggregate([*runs, other])
    with pytest.raises(InputError, match="same seed 0"):
        reports.aggregate([runs[0], runs[0]])
    with pytest.raises(InputError, match="at least one"):
        reports.aggregate([])


def test_differences_over_images_by_hand(small):
    (row,) = reports.differences([reports.read_run(small)])
    assert (row.first, row.second, row.pairs) == ("learned scores, 99 %", "dense", 10)
    assert (row.first_only, row.second_only) == (1, 2)
    assert row.certified.value == pytest.approx(-0.1)
    # Bonett and Price: (b + 1)/(n + 2) - (c + 1)/(n + 2) -+ z sqrt((p + q - (p - q)^2)/(n + 2))
    half = 1.959964 * math.sqrt((5 / 12 - (1 / 12) ** 2) / 12)
    assert row.certified.lower == pytest.approx(-1 / 12 - half, abs=1e-6)
    assert row.certified.upper == pytest.approx(-1 / 12 + half, abs=1e-6)


def test_paired_interval_covers_as_often_as_it_says():
    """Exact coverage at n = 40 for some pairs of discordant probabilities: near or above 95 %."""
    n = 40
    for p, q in ((0.1, 0.05), (0.2, 0.2), (0.3, 0.05)):
        covered = 0.0
        for b in range(n + 1):
            for c in range(n + 1 - b):
                ways = math.comb(n, b) * math.comb(n - b, c)
                chance = ways * p**b * q**c * (1 - p - q) ** (n - b - c)
                rate = paired_rate(b, c, n)
                covered += chance * (rate.lower <= p - q <= rate.upper)
        assert covered > 0.94


def test_differences_over_seeds_pair_seed_by_seed(tmp_path):
    runs = _seeds(tmp_path)
    found = {(row.variant, row.second): row for row in reports.differences(runs)}
    assert set(found) == {
        ("score-erk-0.95", "dense"),
        ("score-erk-0.95", "least magnitude, 95 %"),
        ("score-erk-0.99", "dense"),
        ("score-erk-0.99", "least magnitude, 99 %"),
    }
    row = found["score-erk-0.99", "least magnitude, 99 %"]
    gaps = []
    for run in runs:
        by_name = {item.variant: item.certified.value for item in reports.summary_rows(run, 0.1)}
        gaps.append(by_name["score-erk-0.99"] - by_name["magnitude-erk-0.99"])
    assert row.certified.value == pytest.approx(sum(gaps) / 3)
    assert (row.pairs, row.over) == (3, "seeds")
    assert row.certified.lower < row.certified.value < row.certified.upper


def test_page_of_several_runs(tmp_path):
    runs = _seeds(tmp_path)
    page = reports.write_report([run.folder for run in runs], tmp_path / "all.html").read_text()
    assert "s0, s1, s2: one recipe, seeds 0, 1, 2" in page
    assert page.count("<article") == 3
    mean = reports.aggregate(runs, eps=0.1)[0].certified.value
    assert f">{100 * mean:.1f} <span" in page


def test_curves_of_ledgers(finished, tmp_path):
    paths = sorted((finished / "certificates").glob("*-0.99/*.jsonl"))
    curves = reports.read_curves(paths)
    assert [curve.label for curve in curves] == ["learned scores, 99 %", "least magnitude, 99 %"]
    rows = {row.eps: row for row in reports.summary_rows(reports.read_run(finished)) if row.variant == "score-erk-0.99"}
    assert [point.eps for point in curves[0].points] == [0.0, 0.02, 0.05, 0.1, 0.15]
    assert curves[0].points[0].certified == rows[0.1].clean
    assert all(point.certified == rows[point.eps].certified for point in curves[0].points[1:])
    out = tmp_path / "sub" / "curve.png"
    assert reports.write_curves(paths, out) == [out, out.with_suffix(".csv")]
    table = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert len(table) == 10
    assert float(table[3]["certified"]) == rows[0.1].certified.value
    assert float(table[3]["certified_upper"]) == rows[0.1].certified.upper
    assert reports.write_curves(paths, tmp_path / "only.csv") == [tmp_path / "only.csv"]
    assert (tmp_path / "only.csv").read_text() == out.with_suffix(".csv").read_text()


def test_curves_of_several_seeds_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / f"s{seed}", seed=seed, count=20).joinpath("certificates") for seed in (0, 1)]
    curves = reports.read_curves([folder / "dense" / "eps-0.1.jsonl" for folder in folders])
    assert [curve.label for curve in curves] == ["dense (seed 0)", "dense (seed 1)"]
    assert len(set(styles(curve.network for curve in curves))) == 2


def test_smoothing_log_is_the_fraction_right_at_each_radius(tmp_path):
    log = tmp_path / "sigma_0.25.tsv"
    log.write_text(
        LOG + "0\t1\t1\t0.5\t1\t0:00:01\n20\t2\t3\t0.9\t0\t0:00:01\n40\t2\t2\t0.25\t1\t0:00:01\n"
        "60\t2\t-1\t0.0\t0\t0:00:01\n80\t4\t4\t0.5\t1\t0:00:01\n"
    )
    (curve,) = reports.read_curves([log])
    assert (curve.label, curve.norm, curve.stepped) == ("sigma_0.25", "l2", True)
    at = {radius: accuracy_at(curve, radius) for radius in (0, 0.25, 0.2501, 0.5, 0.51, 0.9)}
    assert at == {0: 0.6, 0.25: 0.6, 0.2501: 0.4, 0.5: 0.4, 0.51: 0.0, 0.9: 0.0}
    assert [(point.eps, point.n) for point in curve.points] == [(0.0, 5), (0.25, 5), (0.5, 5)]
    figures = reports.write_curves([log], tmp_path / "log.svg")
    assert all(path.stat().st_size for path in figures)


def test_smoothing_log_without_a_right_answer_is_zero(tmp_path):
    log = tmp_path / "bad.tsv"
    log.write_text(LOG + "0\t1\t2\t0.5\t0\t0:00:01\n")
    (curve,) = reports.read_curves([log])
    assert accuracy_at(curve, 0.0) == 0.0
    reports.write_curves([log], tmp_path / "bad.png")


def test_curve_errors(finished, tmp_path):
    ledger = finished / "certificates" / "dense" / "eps-0.1.jsonl"
    log = tmp_path / "log.tsv"
    log.write_text(LOG + "0\t1\t1\t0.5\t1\t0:00:01\n")

    def refused(paths, match, out="x.png"):
        with pytest.raises(InputError, match=match):
            reports.write_curves(paths, tmp_path / out)
        assert not (tmp_path / out).exists()

    refused([], "No ledger was given")
    refused([ledger, log], "Draw one chart per norm")
    refused([tmp_path / "absent.jsonl"], "cannot be read")
    refused([ledger], "can be written as", "x.gif")
    for content, match in (
        ("", "is empty"),
        ("hello\n", "is neither"),
        (LOG, "only its header"),
        (LOG + "0\t1\t1\tfar\t1\t0\n", "Line 2"),
        (LOG + "0\t1\t1\t0.5\t2\t0\n", "Line 2"),
        (LOG + "0\t1\t1\n", "Line 2"),
        (ledger.read_text().splitlines(keepends=True)[0], "no verdict yet"),
    ):
        other = tmp_path / "other"
        other.write_text(content)
        refused([other], match)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused([tmp_path / "binary"], "is neither")
    twin = tmp_path / "twin.jsonl"
    twin.write_text(ledger.read_text())
    refused([ledger, twin], "same network at the same eps")
    assert len(reports.read_curves([ledger, ledger])) == 1  # the very same file counts once


def test_looks_tell_networks_apart():
    networks = [Network("dense", sparsity=0.0)]
    networks += [
        Network(f"{criterion}-{budget}-{sparsity}", criterion, budget, sparsity)
        for criterion in ("score", "magnitude", "random")
        for budget in ("erk", "uniform")
        for sparsity in (0.9, 0.95, 0.99)
    ]
    assert len(set(labels(networks))) == len(networks)
    assert "learned scores, ERK, 99 %" in labels(networks)
    found = styles(networks)
    assert len(set(found)) == len(networks)
    same = [style for style, network in zip(found, networks, strict=True) if network.sparsity == 0.95]
    assert len({style.slot for style in same}) == 1


def test_spread_labels_do_not_overlap_and_stay_inside():
    placed = spread([5.0, 5.1, 5.2, 9.9], gap=1.0, low=0.0, high=10.0)
    assert placed == pytest.approx([4.1, 5.1, 6.1, 9.9])
    crowded = spread([9.0, 9.5, 10.0], gap=2.0, low=0.0, high=10.0)
    assert crowded == pytest.approx([6.0, 8.0, 10.0])
    assert spread([3.0, 1.0], gap=0.5, low=0.0, high=10.0) == [3.0, 1.0]


def test_differences_are_signed_but_for_zero():
    assert points(Rate(0.1, -0.0001, 0.2), sign=True) == ("+10.0", "[0.0, +20.0]")
    assert points(Rate(-0.1, None, None), sign=True) == "−10.0"
    assert points(Rate(1.0, 0.9, 1.0)) == ("100.0", "[90.0, 100]")


def test_percent_never_rounds_up_to_all():
    assert [percent(value, 2) for value in (0.0, 0.9, 0.995, 0.99996, 1.0)] == [
        "0 %",
        "90 %",
        "99.5 %",
        "99.996 %",
        "100 %",
    ]


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.013, 0.1, 4) == [0.025, 0.05, 0.075, 0.1]
    assert ticks(3.0, 3.0) == [3.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.04, "< 0.1 s"),
        (0.06, "0.1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (754, "12 min 34 s"),
    ]
    + [(3 * 3600 + 125, "3 h 2 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_network_the_recipe_forgot_is_still_shown(run):
    write_stage(run / "mine" / "finetune", 0.9, 3, 0.8, random.Random(0))
    write_ledger(run, "mine", 0.1, [verdict(0, "certified", 0.1, "ibp")], sparsity=0.9)
    rows = reports.summary_rows(reports.read_run(run), 0.1)
    assert {row.variant: row.label for row in rows}["mine"] == "mine"


def test_reports_never_load_a_model():
    for path in Path(reports.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "torchvision", "safetensors"), path
                ours = ("reports", "storage", "variant_names", "stage_settings")
                allowed = (*(f"certprune.{part}" for part in ours), "certprune import reports")
                assert not name.startswith("certprune") or name.startswith(allowed), path
