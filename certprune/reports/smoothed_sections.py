"""Certificates by randomized smoothing on the page: cards, tables at the recipe's radii, the curve, differences.

Every function takes a run that may be unfinished and returns an empty string where there is nothing to show.
"""

import math
from html import escape

from certprune.reports.compare import BASELINES
from certprune.reports.look import styles
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
    return card(row.label, row.certified[row.radii.index(radius)], f"certified at ℓ2 radius {radius:g}", lines, slot)


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
    return (
        html_table(gaps, hide=("eps",))
        + f'<p class="note">Certified accuracy at ℓ2 radius {gaps[0].eps:g} of the network less that of the one it is '
        "compared with, on the same images under the same noise. In brackets, a 95 % interval for paired proportions; "
        "one that leaves out 0 is a difference that these test images can tell.</p>"
    )


def _table(rows: list[SmoothedRow]) -> str:
    hide = ("Weights kept", "Images") if _one_count(rows) else ("Weights kept",)  # the page is only so wide
    return html_table(rows, hide) + f'<p class="note">{escape(_about(rows))}</p>'


def _one_count(rows: list[SmoothedRow]) -> bool:
    return len({row.n for row in rows}) == 1


def _way(row: SmoothedRow) -> str:
    return f"sigma {row.sigma:g}, n {row.samples:,}" if row.samples else f"sigma {row.sigma:g}"


def _about(rows: list[SmoothedRow]) -> str:
    first = rows[0]
    images = f"{first.n:,} images" if _one_count(rows) else "the images"
    text = (
        f"Per cent of {images} that are right with a certified ℓ2 radius (pixels in [0, 1]) of at least r, by "
        f"smoothing with noise of sigma {first.sigma:g}; in brackets, 95 % Wilson intervals."
    )
    if first.samples and first.alpha:
        from certifiers.smoothing import certified_radius, lower_confidence_bound

        most = certified_radius(lower_confidence_bound(first.samples, first.samples, first.alpha), first.sigma)
        text += (
            f" Each image’s radius comes from {first.samples:,} noisy copies and holds with probability "
            f"{1 - first.alpha:g}; so many copies can certify no radius above {math.ceil(1000 * most) / 1000:g}."
        )
    if not _one_count(rows):
        text += " The networks were not certified on equally many images: do not compare them yet."
    return text
