"""The largest eps certified for each image, on the page: a table line for each network and the staircases."""

from html import escape

from certprune.reports.asked import asked_count, fewer
from certprune.reports.curve_charts import stairs_figure
from certprune.reports.curves import radius_run_curves
from certprune.reports.look import NORMS
from certprune.reports.radius_rows import RadiusRow, radius_rows, shown_eps
from certprune.reports.read import RunView
from certprune.reports.sections import listed
from certprune.reports.tables import html_table


def radii(run: RunView, chart: bool = True) -> str:
    """The chart of the first way of finding radii, its table, and other ways folded away; "" where there are none."""
    groups = radius_rows(run)
    if not groups:
        return ""
    text = (_chart(run, groups[0][0]) if chart else "") + _table(run, groups[0])
    if len(groups) > 1:
        ways = listed(_way(rows[0]) for rows in groups[1:])
        inner = "".join(f"<h3>{escape(_way(rows[0]))}</h3>{_table(run, rows)}" for rows in groups[1:])
        text += f"<details><summary>Found otherwise: {escape(ways)}</summary>{inner}</details>"
    return text


def _chart(run: RunView, first: RadiusRow) -> str:
    curves = radius_run_curves(run, (first.largest, first.tolerance, first.norm, first.method))
    caption = (
        f"Certified accuracy against eps in {NORMS.get(first.norm, first.norm)}, with 95 % Wilson bands: an image "
        "counts at every eps up to the largest that was certified for it, so the lines hold between the marks too. "
        f"Looked for up to eps {first.largest:g}, where the lines end. Colour tells the sparsity, the line style how "
        "the kept weights were chosen."
    )
    return stairs_figure(curves, shown_eps(run, first.largest), escape(caption))


def _table(run: RunView, rows: list[RadiusRow]) -> str:
    hide = ("Images",) if len({row.n for row in rows}) == 1 else ()
    return html_table(rows, hide) + f'<p class="note">{escape(_about(run, rows))}</p>'


def _way(row: RadiusRow) -> str:
    return f"{row.method} up to eps {row.largest:g}, to {row.tolerance:g}"


def _about(run: RunView, rows: list[RadiusRow]) -> str:
    first, counts = rows[0], {row.n for row in rows}
    images = f"{first.n:,} images" if len(counts) == 1 else "the images"
    text = (
        f"The largest eps in {NORMS.get(first.norm, first.norm)} at which an image is certified, of {images}, by "
        f"{first.method}, up to eps {first.largest:g} and to {first.tolerance:g}. “Half up to”: at this eps half of "
        "all images are certified. The mean is over all images; wrong ones have 0. Then, per cent certified at each "
        "eps; in brackets, 95 % Wilson intervals."
    )
    if len(counts) > 1:
        text += " The networks were not certified on equally many images: do not compare them yet."
    return text + fewer(counts, asked_count(run.config))
