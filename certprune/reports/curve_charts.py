"""Certified accuracy against eps or radius on the page: a large chart of a run, or small ones of several runs."""

from dataclasses import replace
from html import escape

from certprune.reports.curves import Curve, distance_label, rate_at, run_curves, smoothed_run_curves
from certprune.reports.look import NORMS, Style, styles
from certprune.reports.read import RunView
from certprune.reports.smoothed import shown_radii, smoothing_settings
from certprune.reports.svg import Axes, Line, line_chart, swatch

WIDE, NARROW, SMALL = (980, 430), (380, 300), (340, 260)
STEPS = 200  # of a staircase's drawing


def curve(run: RunView) -> str:
    """The chart of one run in two drawings, of which the page shows the one that fits."""
    curves = run_curves(run)
    if not curves:
        return ""
    lines, axes = _lines(curves), _axes(curves)
    return (
        f'<figure><div class="wide">{line_chart(lines, axes, *WIDE)}</div>'
        f'<div class="narrow">{line_chart(lines, axes, *NARROW, direct=False)}{_legend(lines)}</div>'
        "<figcaption>Certified accuracy against eps, with 95 % Wilson bands. The points are measured; the lines "
        "between them only guide the eye. At eps 0 it is the clean accuracy. Colour tells the sparsity, the line "
        "style how the kept weights were chosen.</figcaption></figure>"
    )


def radius_curve(run: RunView) -> str:
    """The staircases of the recipe's own way of smoothing, in two drawings like :func:`curve`."""
    views = [view for variant in run.variants for view in variant.smoothed]
    if not views:
        return ""
    planned = smoothing_settings(run.config).get("sigma")
    own = [view for view in views if view.usual and view.sigma == planned]
    chosen = (own or views)[0].settings
    curves = smoothed_run_curves(run, chosen)
    caption = (
        f"Certified accuracy against the {NORMS[curves[0].norm]} radius, by smoothing with noise of sigma "
        f"{chosen[0]:g}, with 95 % Wilson bands: an image counts at every radius up to its own. The "
        "marks are at the radii of the table. "
        "Colour tells the sparsity, the line style how the kept weights were chosen."
    )
    return stairs_figure(curves, shown_radii(run.config), caption)


def stairs_figure(curves: list[Curve], radii: tuple[float, ...], caption: str) -> str:
    """Staircases in two drawings like :func:`curve`, marked at ``radii``; ``caption`` is HTML."""
    axes = replace(_axes(curves), x_ticks=None)
    looks = styles(item.network for item in curves)
    reach = max(item.points[-1].eps for item in curves)
    lines = [_stairs(item, style, radii, reach) for item, style in zip(curves, looks, strict=True)]
    return (
        f'<figure><div class="wide">{line_chart(lines, axes, *WIDE, direct=False)}</div>'
        f'<div class="narrow">{line_chart(lines, axes, *NARROW, direct=False)}</div>{_legend(lines)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def side_by_side(runs: list[RunView]) -> str:
    """A small chart of each run, all on the same scales; one legend where it serves all."""
    drawn = [(run.name, curves, _lines(curves)) for run in runs if (curves := run_curves(run))]
    if not drawn:
        return ""
    every = [line for _, _, lines in drawn for line in lines]
    low, high = min(y for line in every for y in line.lower), max(y for line in every for y in line.upper)
    room = 0.05 * (high - low) or 0.05
    y_range = (max(low - room, 0.0), min(high + room, 1.0))
    one_norm = len({curves[0].norm for _, curves, _ in drawn}) == 1
    x_range = (0.0, max(x for line in every for x in line.xs)) if one_norm else None
    legends = [_legend(lines) for _, _, lines in drawn]
    shared = len(set(legends)) == 1
    panels = "".join(
        f"<div><h3>{escape(name)}</h3>"
        f"{line_chart(lines, _axes(curves, x_range, y_range), *SMALL, direct=False)}{'' if shared else legend}</div>"
        for (name, curves, lines), legend in zip(drawn, legends, strict=True)
    )
    return f'<figure><div class="panels">{panels}</div>{legends[0] if shared else ""}</figure>'


def _axes(curves: list[Curve], x_range=None, y_range=None) -> Axes:
    return Axes(
        x_label=distance_label(curves),
        y_label="Certified accuracy",
        y_format=lambda value: f"{100 * value:.1f}".removesuffix(".0") + " %",
        y_limit=(0.0, 1.0),
        x_ticks=tuple(sorted({point.eps for item in curves for point in item.points})),
        x_range=x_range,
        y_range=y_range,
    )


def _lines(curves: list[Curve]) -> list[Line]:
    looks = styles(item.network for item in curves)
    return [_line(item, style) for item, style in zip(curves, looks, strict=True)]


def _line(item: Curve, style: Style) -> Line:
    return Line(
        label=item.label,
        xs=[point.eps for point in item.points],
        ys=[point.certified.value for point in item.points],
        lower=[point.certified.lower for point in item.points],
        upper=[point.certified.upper for point in item.points],
        style=style,
    )


def _stairs(item: Curve, style: Style, radii: tuple[float, ...], reach: float) -> Line:
    """A staircase up to ``reach``, drawn through so many points that its steps show; marked at ``radii``."""
    marked = {radius for radius in radii if radius <= reach}
    xs = sorted({reach * step / STEPS for step in range(STEPS + 1)} | marked)
    found = [rate_at(item, x) for x in xs]
    last, foot = ([reach], [0.0]) if reach < item.until else ([], [])  # else nothing is known further on
    return Line(
        label=item.label,
        xs=[*xs, *last],
        ys=[*(rate.value for rate in found), *foot],
        lower=[*(rate.lower for rate in found), *foot],
        upper=[*(rate.upper for rate in found), *foot],
        style=style,
        points=tuple(place for place, x in enumerate(xs) if x in marked),
    )


def _legend(lines: list[Line]) -> str:
    markers = len({line.style.marker for line in lines}) > 1  # else they would only hide the dashes
    items = "".join(f"<li>{swatch(line.style, markers)}{escape(line.label)}</li>" for line in lines)
    return f'<ul class="legend">{items}</ul>'
