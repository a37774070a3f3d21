"""The report: one HTML page that needs nothing else, no network, no script, no font file."""

import re
from collections.abc import Sequence
from html import escape

from certprune.reports import (
    curve_charts,
    layers,
    notes,
    radius_sections,
    sections,
    smoothed_sections,
    sparsity_charts,
    stages,
    training_charts,
    verdict_bars,
)
from certprune.reports.compare import differences
from certprune.reports.read import RunView
from certprune.reports.rows import NONE, summary_rows
from certprune.reports.seeds import aggregate, group
from certprune.reports.sparsity import many_networks
from certprune.reports.style import CSS
from certprune.reports.tables import html_rate, html_table

HOW = "How each figure was computed"


def report_html(runs: Sequence[RunView]) -> str:
    """The page as text."""
    runs = list(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    body = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", body + _section(HOW, notes.definitions(runs)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · certprune</title><style>{CSS}</style></head>\n<body><main>{body}"
        "<footer>Written by certprune from the run’s own records; no network was run to make this page.</footer>"
        "</main></body></html>\n"
    )


def _one(run: RunView) -> str:
    return (
        f'<header><p class="eyebrow">certprune report</p><h1>{escape(run.name)}</h1>'
        f'<p class="lead">{escape(sections.sentence(run))}</p></header>{_run_body(run)}'
    )


def _run_body(run: RunView, level: int = 2) -> str:
    """All sections of one run; those with nothing to show are left out."""
    many = many_networks(run)
    against_sparsity = ("Accuracy against sparsity", sparsity_charts.sparsity_section(run))
    by_noise = "Summary" if run.main_eps is None else "By randomized smoothing"
    table = (
        ("Summary", sections.summary(run)),
        ("By all methods together", sections.together(run)),
        ("By other methods", sections.other_methods(run)),
        (by_noise, smoothed_sections.tables(run)),
    )
    training = training_charts.pretraining(run) + ("" if many else training_charts.afterwards(run))
    parts = (
        *((against_sparsity, *table) if many else (*table, against_sparsity)),
        ("Certified accuracy against eps", "" if many else curve_charts.curve(run)),
        ("The largest eps certified for each image", radius_sections.radii(run, chart=not many)),
        ("Certified accuracy against radius", "" if many else curve_charts.radius_curve(run)),
        ("How each image was decided", verdict_bars.verdicts(run) + stages.stages(run)),
        ("Differences on the same images", sections.paired(run) + smoothed_sections.paired(run)),
        ("Kept weights by layer", layers.layers(run)),
        ("Training", training),
        ("Provenance", notes.provenance(run)),
        ("To repeat this run", notes.reproduce(run)),
    )
    cards = sections.headline(run) if run.main_eps is not None else smoothed_sections.cards(run)
    text = _notices(run) + ("" if many else cards)
    return text + "".join(_section(heading, content, level) for heading, content in parts)


def _several(runs: list[RunView]) -> str:
    links = "".join(f'<li><a href="#run-{place}">{escape(run.name)}</a></li>' for place, run in enumerate(runs))
    articles = "".join(
        f'<article id="run-{place}"><h2>{escape(run.name)}</h2><p class="lead">{escape(sections.sentence(run))}</p>'
        f"{_run_body(run, 3)}</article>"
        for place, run in enumerate(runs)
    )
    return (
        f'<header><p class="eyebrow">certprune report</p><h1>{len(runs)} runs</h1></header>'
        f"<nav><ul>{links}</ul></nav>{_over_seeds(runs)}{_side_by_side(runs)}{articles}"
    )


def _over_seeds(runs: list[RunView]) -> str:
    """Means over the seeds of every recipe that was run more than once."""
    text = ""
    for members in group(runs):
        eps = members[0].main_eps
        rows = aggregate(members, eps) if len(members) > 1 and eps is not None else []
        if not rows:
            continue
        names = ", ".join(member.name for member in members)
        seeds = ", ".join(str(member.seed) for member in members)
        text += (
            f"<p>{escape(names)}: one recipe, seeds {escape(seeds)}, at eps {eps:g}.</p>"
            f"{html_table(rows, hide=('eps',))}"
            '<p class="note">Means over the seeds; in brackets, 95 % t-intervals over the seeds.</p>'
        )
        gaps = differences(members, eps)
        if gaps:
            hide = ("eps", "Only the first", "Only the second")
            text += (
                f"<h3>Paired differences over the seeds</h3>{html_table(gaps, hide=hide)}"
                '<p class="note">Certified accuracy of the network less that of the one it is compared with, seed by '
                "seed.</p>"
            )
    return _section("Over the seeds", text)


def _side_by_side(runs: list[RunView]) -> str:
    """The curves of all runs next to each other, and one table of certified accuracies, a column for each run."""
    charts = curve_charts.side_by_side(runs)
    if not charts:
        return ""
    tables = [{row.label: row for row in summary_rows(run, run.main_eps)} if run.eps_grid else {} for run in runs]
    head = "".join(
        f'<th scope="col">{escape(run.name)}' + (f", eps {run.main_eps:g}</th>" if run.eps_grid else "</th>")
        for run in runs
    )
    body = "".join(
        f'<tr><th scope="row" class="left">{escape(label)}</th>'
        + "".join(f"<td>{html_rate(rows[label].certified) if label in rows else NONE}</td>" for rows in tables)
        + "</tr>"
        for label in dict.fromkeys(label for rows in tables for label in rows)
    )
    return _section(
        "Side by side",
        f'{charts}<div class="scroll"><table><thead><tr>'
        f'<th scope="col" class="left">Certified %</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">In brackets, 95 % Wilson intervals over the images of each run.</p>',
    )


def _notices(run: RunView) -> str:
    text = ""
    if run.alarms:
        items = "".join(f"<li>{escape(alarm)}</li>" for alarm in run.alarms)
        text += f'<div class="notice alarm"><strong>A certificate was contradicted.</strong><ul>{items}</ul></div>'
    if run.missing:
        items = "".join(f"<li>{escape(line)}</li>" for line in run.missing)
        text += f'<div class="notice"><strong>This run is not finished.</strong><ul>{items}</ul></div>'
    return text


def _section(heading: str, content: str, level: int = 2) -> str:
    return f"<section><h{level}>{escape(heading)}</h{level}>{content}</section>\n" if content else ""
