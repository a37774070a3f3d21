"""Certificates by randomized smoothing on the page: cards, tables at the recipe's radii, the curve, differences.

Every function takes a run that may be unfinished and returns an empty string where there is nothing to show.
"""

import math
from html import escape

from certprune.reports.compare import BASELINES
from certprune.reports.look import NORMS, styles
from certprune.reports.read import RunView
from certprune.reports.rows import network, points
from certprune.reports.sections import CARDS, card, listed
from certprune.reports.smoothed_rows import SmoothedRow, main_radius, smoothed_differences, smoothed_rows
from certprune.reports.tables import html_table


def cards(run: RunView) -> str:
    """One card for the dense network and one for the learned criterion at each sparsity, at the main radius."""
    rows = next(iter(smoothed_rows(run)), [])
    learned = any(row.criterion and row.criterion not in BASELINES for row in rows)
    chosen = [row for row in rows if not (learned and row.criterion in BASELINES) and row.variant != "pretrain"]
    if not chosen:
        return ""
    looks = styles(network(run.variant(row.variant)) for row in rows)
    slots = {row.variant: style.slot for row, style in zip(rows, looks, strict=True)}
    gaps = smoothed_differences(run, rows[0].sigma)
    return f'<div class="cards">{"".join(_card(row, gaps, slots[row.variant]) for row in chosen[:CARDS])}</div>'


def _card(row: SmoothedRow, gaps, slot: int) -> str:
    radius = main_radius(row.radii)
    kept = f"{row.kept:,} of {row.weights:,} weights" if row.kept is not None and row.weights else ""
    against = [gap for gap in gaps if gap.variant == row.variant]
    lines = [kept, *(f"{points(gap.certified, sign=True)[0]} points against {gap.second}" for gap in against)]
    return card(
        row.label,
        row.certified[row.radii.index(radius)],
        f"certified at {NORMS[row.norm]} radius {radius:g}",
        lines,
        slot,
    )


def tables(run: RunView) -> str:
    """The table of the recipe's own way of smoothing, then the others folded away."""
    groups = smoothed_rows(run)
    if not groups:
        return ""
    text = _table(groups[0])
    if len(groups) > 1:
        inner = "".join(f"<h3>{escape(_way(rows[0]))}</h3>{_table(rows)}" for rows in groups[1:])
        text += f"<details><summary>Smoothed otherwise: {escape(listed(_way(r[0]) for r in groups[1:]))}</summary>"
        text += f"{inner}</details>"
    return text


def paired(run: RunView) -> str:
    """The paired differences over images at the main radius."""
    groups = smoothed_rows(run)
    gaps = smoothed_differences(run, groups[0][0].sigma) if groups else []
    if not gaps:
        return ""
    norm = NORMS[groups[0][0].norm]
    return (
        html_table(gaps, hide=("eps",))
        + f'<p class="note">Certified accuracy at {norm} radius {gaps[0].eps:g} of the network less that of the one it '
        "is compared with, on the same images under the same noise. In brackets, a 95 % interval for paired shares; "
        "one that leaves out 0 is a difference that these images can tell.</p>"
    )


def _table(rows: list[SmoothedRow]) -> str:
    hide = ("Weights kept", "Images") if _one_count(rows) else ("Weights kept",)  # the page is only so wide
    return html_table(rows, hide) + f'<p class="note">{escape(_about(rows))}</p>'


def _one_count(rows: list[SmoothedRow]) -> bool:
    return len({row.n for row in rows}) == 1


def _way(row: SmoothedRow) -> str:
    words = [f"sigma {row.sigma:g}", f"n {row.samples:,}" if row.samples else "", row.rule]
    return ", ".join(filter(None, ["uniform noise" if row.norm == "l1" else "", *words]))


def _about(rows: list[SmoothedRow]) -> str:
    first = rows[0]
    images = f"{first.n:,} images" if _one_count(rows) else "the images"
    noise = "uniform" if first.norm == "l1" else "Gaussian"
    text = (
        f"Per cent of {images} that are right with a certified {NORMS[first.norm]} radius (pixels in [0, 1]) of at "
        f"least r, by smoothing with {noise} noise of sigma {first.sigma:g}; in brackets, 95 % Wilson intervals."
    )
    if first.samples and first.alpha:
        text += _samples(first)
    if not _one_count(rows):
        text += " The networks were not certified on equally many images: do not compare them yet."
    return text


def _samples(row: SmoothedRow) -> str:
    """How many noisy copies stand behind a radius, and the most that they can certify."""
    from certifiers.smoothing import certified_radius, lower_confidence_bound, lower_sequence

    n, anytime = row.samples, row.rule not in ("", "shared noise")
    bound = float(lower_sequence(n, n, row.alpha)) if anytime else lower_confidence_bound(n, n, row.alpha)
    most = certified_radius(bound, row.sigma, "uniform" if row.norm == "l1" else "gaussian")
    early = f" at most (stopped early: {row.rule}; {row.drawn:,.0f} on average)" if anytime and row.drawn else ""
    return (
        f" Each image’s radius comes from {n:,} noisy copies{early} and holds with probability {1 - row.alpha:g}; "
        f"so many copies can certify no radius above {math.ceil(1000 * most) / 1000:g}."
    )
