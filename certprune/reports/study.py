"""One Markdown page about networks of one or more recipes, each over several seeds: what ``results/`` holds.

Tables by sparsity, paired tests, and what reviewers of HYDRA asked; with a CSV of every network of every seed, one of
every test, and pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from certifiers.errors import InputError
from certprune.reports.following import following
from certprune.reports.kept_weights import kept_weights, told, weights_chart
from certprune.reports.look import NORMS, percent
from certprune.reports.read import RunView
from certprune.reports.rows import NONE, Column, duration, points
from certprune.reports.splits import images_of, reuse, splits_of
from certprune.reports.study_charts import certified_chart, clean_chart
from certprune.reports.study_csv import networks_csv, tests_csv
from certprune.reports.study_rows import Section, StudyRow, recipes_of, sections_of
from certprune.reports.study_tests import (
    Comparison,
    against_dense,
    against_elsewhere,
    against_magnitude,
    against_published,
    at_equal_budgets,
)
from certprune.reports.tables import markdown_table
from certprune.storage import write_bytes, write_text

NOTES = """\
Clean: the share of {images} that are classified correctly. Attack: correct and not broken by PGD. Certified:
correct *and* proven for every perturbation of the threat set, by any of the methods named; IBP certified: by interval
bounds alone. The true robust accuracy lies between certified and attack. Unstable units: how many ReLUs interval
bounds cannot tell to be active or inactive around a {image}, on average. Epochs and training time are those from
a network's first weights on: the pretraining that the networks of one run share is in each of them.

Means over seeds; in brackets, 95 % Student t-intervals over the seeds (other training runs). One seed has no interval.
{selected} A dash is a figure that
was not measured, never a zero. In bold, the highest certified accuracy at a sparsity of the networks with the most
seeds there.
"""

TESTS = """\
Differences in certified accuracy, first less second, on {images}. Budget and schedule of
each criterion, the baseline's too, are those with the highest certified accuracy on *validation* images, unless a
table says otherwise. Compared are networks with the same pretraining and as many epochs.

Interval and p answer for new training runs *and* new images: {design}, and how
little a few seeds tell of their own variance is in both (a generalised p value). p, Holm: adjusted for all
comparisons of the table. p, clustered: a linear probability model with covariance clustered by seeds and by images
(statsmodels), as a second opinion; a dash where {dash}. Last, for each seed alone: images
that only the first and only the second network certifies, and the exact McNemar p, which says nothing about other
seeds. The limits: a few seeds are a small sample, so that a real difference of a point can be missed, and the tests
take the differences of the seeds as normal, which training runs that collapse are not; one seed alone has no p but
McNemar's; intervals are not adjusted for being many; and a network that was chosen on
validation images is tested as if no other had been a candidate.
"""

CROSSED = {"design": "seeds and images are crossed random effects", "dash": "its variance comes out negative"}
APART = {
    "design": "each seed has images of its own, so that its difference varies with both",
    "dash": "seeds do not share their images",
}

QUESTIONS = (
    (
        "Against the strongest magnitude",
        against_magnitude,
        "Masks learned on the certified loss against least magnitude.",
    ),
    ("Against the dense network", against_dense, "The dense network is trained for as many epochs."),
    (
        "Against HYDRA as published",
        against_published,
        "Learned scores in one shot, the same fraction of every layer, are HYDRA's published setting.",
    ),
    (
        "Against baselines under the same budget and schedule",
        at_equal_budgets,
        "Every learned network against each baseline that shares all but the criterion.",
    ),
)


def write_study(
    runs: Sequence[RunView],
    out: Path,
    title: str,
    command: str,
    eps: float,
    unstable: Mapping[tuple[str, str], float] | None = None,
    note: str = "",
) -> list[Path]:
    """Write the page to ``out`` and, beside it, its CSVs and pictures; returns all files.

    ``unstable``: the mean number of unstable units an image, by run folder and network, where it was counted.
    ``note``: a paragraph under the heading, in the words of whoever asks.
    Raises InputError for a name that is no page's, and as :func:`recipes_of` does.
    """
    if out.suffix in (".csv", ".png"):
        raise InputError(f"The page is Markdown and a CSV goes beside it, but {out} was asked for. Give a .md name.")
    sections = sections_of(runs, eps, unstable)
    tests = {section.title: _tests(section) for section in sections}
    pictures = _pictures(sections, out)
    text = study_page(
        runs, sections, title, command, eps, tests, {key: path.name for key, (path, _) in pictures.items()}, note
    )
    write_text(out, text)
    write_text(out.with_suffix(".csv"), networks_csv(sections, eps))
    files = [out, out.with_suffix(".csv")]
    if any(rows for found in tests.values() for rows in found.values()):
        files.append(out.with_name(f"{out.stem}-tests.csv"))
        write_text(files[-1], tests_csv(tests))
    for path, content in pictures.values():
        write_bytes(path, content)
    return files + [path for path, _ in pictures.values()]


def study_page(
    runs: Sequence[RunView],
    sections: Sequence[Section],
    title: str,
    command: str,
    eps: float,
    tests: Mapping[str, Mapping[str, list[Comparison]]],
    pictures: Mapping[tuple[str, str], str],
    note: str = "",
) -> str:
    """The page as text; ``pictures`` are file names by the section's title and what they show."""
    splits = splits_of(runs)
    parts = [f"# {title}", note, f"Made by `{command}`.", _notes(splits)]
    for section in sections:
        shown = {what: name for (title_, what), name in pictures.items() if title_ == section.title}
        explained = _tests_explained(splits, tests) if section is sections[0] else ""
        parts += _section(section, eps, tests[section.title], shown, explained)
    missing = missing_lines(runs)
    if missing:
        parts += ["## Not there yet", "\n".join(f"- {line}" for line in missing)]
    parts += ["## Where the figures come from", origin(runs)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def missing_lines(runs: Sequence[RunView]) -> list[str]:
    """What each run lacks, networks that lack the same in one line; those that only other seeds have, too."""
    lines = []
    for members in recipes_of(runs):
        planned = dict.fromkeys(variant.name for run in members for variant in run.variants)
        for run in members:
            held: dict[str, list[str]] = {}
            for line in run.missing:
                name, colon, what = line.partition(": ")
                held.setdefault(what if colon else line, []).extend([name] if colon else [])
            alike = [other for other in members if other.seed == run.seed]
            absent = [name for name in planned if all(other.variant(name) is None for other in alike)]
            if absent and run is alike[0]:
                held["not in this run's recipe."] = absent
            lines += [f"{run.folder.name}: {alarm}" for alarm in run.alarms]
            for what, names in held.items():
                told_of = f"{what.removesuffix('.')}: {', '.join(names)}." if names else what
                lines.append(f"{run.folder.name}: {told_of}")
    return lines


def origin(runs: Sequence[RunView]) -> str:
    """One line a run, as a Markdown list: its seed, training time, threads, processor, torch and commit."""
    named = len({run.name for run in runs}) > 1
    lines = []
    for run in runs:
        seen = run.provenance
        hardware = seen.get("hardware", {})
        stages = seen.get("stages", {}).values()
        hours = sum(stage.get("seconds", 0.0) for stage in stages) / 3600
        lines.append(
            f"- {f'`{run.folder.name}`, ' if named else ''}seed {run.seed}: {hours:.2f} h of training, "
            f"{seen.get('threads', '?')} thread(s) of "
            f"{hardware.get('processor', 'an unnamed processor')}, torch {seen.get('torch', '?')}, "
            f"commit {str(seen.get('git_commit'))[:10]}"
        )
    return "\n".join(lines)


def _notes(splits: Sequence[str]) -> str:
    """What the figures are, of images of these splits."""
    selected = "Epochs are selected on validation images, and the test images were used once, for this page."
    if reuse(splits):
        selected = f"Epochs are selected on validation images. {reuse(splits)}"
    images = images_of(splits)
    return NOTES.format(images=images, image=images.removesuffix("s"), selected=selected)


def _tests_explained(splits: Sequence[str], tests: Mapping[str, Mapping[str, list[Comparison]]]) -> str:
    """What the tests are; where their images made choices too, that p does not know of it."""
    same = all(row.same for found in tests.values() for rows in found.values() for row in rows)
    chose = " Here the images that are tested made these choices, so that p is too small." * ("validation" in splits)
    images = images_of(splits) + (", the same under every seed" if same else "")
    return TESTS.format(images=images, **(CROSSED if same else APART)).rstrip() + chose


def _section(
    section: Section, eps: float, tests: Mapping[str, list[Comparison]], pictures: Mapping[str, str], explained: str
) -> list[str]:
    """All about one architecture; ``explained``: what the tests are, "" where an earlier section says it."""
    parts = [f"## {section.title}, eps {eps:g}", _about(section)]
    if "certified" in pictures:
        parts.append(f"![Certified accuracy against the share of weights removed]({pictures['certified']})")
        parts.append(
            "Small dots are the seeds, lines go through their means. Colour says the criterion, the marker the "
            "budget; dashed lines reach their sparsity at once, solid ones gradually."
        )
    for level, rows in section.groups.items():
        parts += [_heading(level, rows), markdown_table(rows, _columns(section, rows))]
    asked = [part for name, _, note in QUESTIONS if tests.get(name) for part in _question(name, note, tests[name])]
    if asked:
        parts += ["### Which differences are real", explained, *asked]
    follows = following(section)
    if follows:
        parts += ["### Do certified and attack accuracy merely follow clean accuracy?"]
        parts += [" ".join(row.sentence for row in follows)]
        if "clean" in pictures:
            parts.append(f"![Certified and attack accuracy against clean accuracy]({pictures['clean']})")
        parts += [
            markdown_table(follows),
            "In brackets, 95 % bootstrap intervals over the networks, the seeds of one together. At equal sparsity: "
            "the correlation of the deviations from the mean at each sparsity.",
        ]
    elsewhere = tests.get("elsewhere")
    if elsewhere:
        parts += [
            "### Does a criterion that knows nothing of robustness do as well?",
            _elsewhere(elsewhere, images_of(splits_of(section.runs))),
        ]
        parts += [markdown_table(elsewhere)]
    if "weights" in pictures:
        parts += ["### Which pretrained weights are kept", told(kept_weights(section))]
        parts += [f"![Histograms of the pretrained weights that are kept]({pictures['weights']})"]
    return parts


def _question(name: str, note: str, rows: list[Comparison]) -> list[str]:
    return [f"#### {name}", note, markdown_table(rows)]


def _tests(section: Section) -> dict[str, list[Comparison]]:
    found = {name: ask(section) for name, ask, _ in QUESTIONS}
    return found | {"elsewhere": against_elsewhere(section)}


def _pictures(sections: Sequence[Section], out: Path) -> dict[tuple[str, str], tuple[Path, bytes]]:
    """The files and contents of the pictures, by the section's title and what they show."""
    found = {}
    for section in sections:
        kept = kept_weights(section)
        drawn = {
            "certified": certified_chart(section),
            "clean": clean_chart(section),
            "weights": None if kept is None else weights_chart(kept),
        }
        model = "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in section.model)
        apart = f"-{model}" if section is not sections[0] else ""
        for what, content in drawn.items():
            if content is not None:
                found[section.title, what] = (out.with_name(f"{out.stem}{apart}-{what}.png"), content)
    return found


def _about(section: Section) -> str:
    """By which methods, against what, and of which seeds."""
    ledgers = [net.ledger for row in section.rows for net in row.nets.values()]
    header, norm = ledgers[0].header, NORMS.get(ledgers[0].norm, ledgers[0].norm)
    steps = f"PGD of {header['attack_steps']} steps" if "attack_steps" in header else "the ledgers' attack"
    counts = sorted({len(ledger.verdicts) for ledger in ledgers})
    images = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    seeds = ", ".join(str(seed) for seed in section.seeds)
    return (
        f"{norm} perturbations; attacked by {steps}, certified by {ledgers[0].method}; {images} {ledgers[0].images} "
        f"images. Seeds {seeds}."
    )


def _heading(level: float, rows: list[StudyRow]) -> str:
    sized = next((row for row in rows if row.mean("kept") and not row.small), None)
    if sized is None:
        return f"### {percent(level, 2)} removed"
    kept, weights = sized.mean("kept"), sized.mean("weights")
    if not level:
        return f"### Not pruned: {weights:,.0f} weights"
    return f"### {percent(level, 2)} removed: {kept:,.0f} of {weights:,.0f} weights left"


def _columns(section: Section, rows: list[StudyRow]) -> list[Column]:
    most = max(len(row.nets) for row in rows)
    full = [row for row in rows if len(row.nets) == most]
    best = max(full, key=lambda row: row.mean("certified") or 0.0) if len(full) > 1 else None
    counts = {value for row in section.rows for value in row.each("images")}

    def rate(key: str, bold: bool = False):
        def cell(row: StudyRow) -> str | tuple[str, str]:
            text = points(row.rate(key))
            if not (bold and row is best):
                return text
            return (f"**{text[0]}**", text[1]) if isinstance(text, tuple) else f"**{text}**"

        return cell

    columns = [
        Column("Network", lambda row: row.label, left=True),
        Column("Weights", lambda row: _number(row.mean("kept"), 0)),
        Column("Clean %", rate("clean")),
        Column("Attack %", rate("attack")),
        Column("IBP certified %", rate("ibp")),
        Column("Certified %", rate("certified", bold=True)),
        Column("Unstable units", lambda row: _number(row.mean("unstable_units"), 1)),
        Column("Epochs", lambda row: _number(row.mean("epochs"), 0)),
        Column("Training", lambda row: duration(_training(row))),
        Column("Seeds", lambda row: f"{len(row.nets)} of {len(section.seeds)}"),
    ]
    images = Column("Images", lambda row: _number(min(row.each("images")), 0))
    return columns if len(counts) == 1 else [*columns, images]


def _training(row: StudyRow) -> float | None:
    own = row.mean("training_seconds")
    return None if own is None else own + (row.mean("pretraining_seconds") or 0.0)


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _elsewhere(rows: list[Comparison], images: str) -> str:
    """One sentence of what the comparisons with masks from another loss say."""
    clear = [row for row in rows if row.adjusted is not None and row.adjusted < 0.05]
    better = sum(row.crossed.difference.value > 0 for row in clear)
    gaps = [100 * row.crossed.difference.value for row in rows]
    least, most = (f"{gap:+.1f}".replace("-", "\N{MINUS SIGN}") for gap in (min(gaps), max(gaps)))
    return (
        "Networks that were pruned against one loss and finetuned for another, held against those that validation "
        "chooses among networks pruned on the loss they are for, at the same sparsity (of the same criterion, budget "
        f"and schedule where there is one). The latter are certified on {least} to {most} points more {images}; of "
        f"{len(rows)} comparisons {len(clear)} are significant at 5 % after Holm's correction, {better} of these in "
        "favour of pruning on the loss that counts."
    )
