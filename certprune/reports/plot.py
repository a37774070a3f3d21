"""Charts as files: certified accuracy against eps by matplotlib, without pyplot and its global state."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from certifiers.errors import InputError
from certprune.reports.curve_files import read_curves
from certprune.reports.curves import Curve, curves_csv, distance_label
from certprune.reports.look import LIGHT, Style, spread, styles
from certprune.storage import write_bytes, write_text

LONG_LABEL, MANY_LABELS = 34, 14  # characters, and labels beside a chart
LEGEND_LINE = 0.19  # inches
INK, QUIET = "#20242c", "#6b7280"
FORMATS = (".png", ".svg", ".pdf")
NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # equal curves give equal files


def curve_figure(curves: Sequence[Curve], size: tuple[float, float] = (7.2, 4.2)) -> Figure:
    """Certified accuracy against eps with Wilson bands, each curve labelled at its end, or in a legend.

    ``size`` in inches; a legend below the chart makes it higher.
    """
    place = _label_place(curves)
    columns, rows = _legend_grid(curves, size[0]) if place == "below" else (1, 0)
    height = size[1] + rows * LEGEND_LINE
    figure = Figure(figsize=(size[0], height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    looks = styles(curve.network for curve in curves)
    for curve, style in zip(curves, looks, strict=True):
        _draw(axes, curve, style)
    values = [
        rate for curve in curves for point in curve.points for rate in (point.certified.lower, point.certified.upper)
    ]
    stepped = any(curve.stepped for curve in curves)
    low, high = 0.0 if stepped else min(values), max(values)
    room = 0.06 * (high - low) or 0.05
    axes.set_ylim(max(low - room, -0.005), min(high + room, 1.005))
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=" %"))
    axes.set_xlabel(distance_label(curves), color=INK)
    axes.set_title("Certified accuracy", loc="left", fontsize=11, color=INK)
    dress(axes)
    grid = sorted({point.eps for curve in curves for point in curve.points})
    if len(grid) <= 8 and not stepped:
        axes.set_xticks(grid, [f"{eps:g}" for eps in grid])
    else:
        axes.xaxis.set_major_formatter("{x:g}")
    if place == "end":
        _end_labels(axes, curves, looks, size[1])
    else:
        where = {"beside": "outside right upper", "below": "outside lower left"}[place]
        figure.legend(loc=where, ncols=columns, frameon=False, fontsize=9, labelcolor=INK, handlelength=3)
    return figure


def dress(axes) -> None:
    """The look that all charts share: light horizontal lines, and a frame of the lower axis alone."""
    axes.grid(axis="y", color="#e3e5ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.tick_params(axis="x", length=3, color=QUIET)


def write_curves(paths: Sequence[str | Path], out: str | Path, norm: str | None = None) -> list[Path]:
    """Draw the curves of ledgers and smoothing logs into ``out`` (PNG, SVG or PDF), their values into a CSV beside it.

    A name that ends in .csv asks for the values alone. Returns the files written. Raises InputError as
    ``read_curves`` does, and for another kind of ``out``.
    """
    return save_curves(read_curves(paths, norm), out)


def save_curves(curves: Sequence[Curve], out: str | Path) -> list[Path]:
    """Write the chart of ``curves`` and the CSV beside it; see :func:`write_curves`."""
    out = Path(out)
    kind, table = out.suffix.lower(), out.with_suffix(".csv")
    if kind not in (*FORMATS, ".csv"):
        known = ", ".join((*FORMATS, ".csv"))
        raise InputError(f"A curve can be written as {known}, but '{out}' was asked for. Give it such a name.")
    if kind in FORMATS:
        content = io.BytesIO()
        curve_figure(curves).savefig(content, format=kind[1:], metadata=NO_DATE.get(kind))
        write_bytes(out, content.getvalue())
    write_text(table, curves_csv(curves))
    return [out, table] if kind in FORMATS else [table]


def _label_place(curves: Sequence[Curve]) -> str:
    """Where labels are read best: at the "end" of each curve, "beside" the chart or "below" it.

    Staircases end at zero, where labels would crowd, and long ones would leave the chart no room.
    """
    longest = max(len(curve.label) for curve in curves)
    if longest > LONG_LABEL or len(curves) > MANY_LABELS:
        return "below"
    one_end = len({curve.points[-1].eps for curve in curves}) == 1
    return "end" if one_end and not any(curve.stepped for curve in curves) else "beside"


def _legend_grid(curves: Sequence[Curve], width: float) -> tuple[int, int]:
    """Columns and rows of a legend that is ``width`` inches wide."""
    longest = max(len(curve.label) for curve in curves)
    columns = max(1, min(int(width / (0.08 * longest + 0.75)), len(curves)))
    return columns, -(-len(curves) // columns)


def _draw(axes, curve: Curve, style: Style) -> None:
    xs = [point.eps for point in curve.points]
    ys = [point.certified.value for point in curve.points]
    low = [point.certified.lower for point in curve.points]
    high = [point.certified.upper for point in curve.points]
    colour, text = LIGHT[style.slot], _plain(curve.label)
    dash = (0, tuple(on / 2 for on in style.dash)) if style.dash else "solid"
    if curve.stepped:  # a radius still counts at itself: the value holds up to and including its point
        if xs[-1] < curve.until:
            xs, ys, low, high = [*xs, xs[-1]], [*ys, 0.0], [*low, 0.0], [*high, 0.0]
        axes.fill_between(xs, low, high, step="pre", color=colour, alpha=0.13, linewidth=0)
        axes.step(xs, ys, where="pre", label=text, color=colour, linestyle=dash, linewidth=1.6)
        return
    axes.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)
    line = {"label": text, "color": colour, "linestyle": dash, "linewidth": 1.8, "clip_on": False}
    axes.plot(xs, ys, marker=style.marker, markersize=4.5, **line)


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _end_labels(axes, curves: Sequence[Curve], looks: Sequence[Style], height: float) -> None:
    """Each label at the height where its curve ends, moved apart just enough to be read."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    ends = [0.0 if curve.stepped else curve.points[-1].certified.value for curve in curves]
    gap = (high - low) * 0.175 / (0.8 * height)  # a line of 9-point text, in data units
    placed = spread(ends, gap, low, high)
    for curve, style, end, y in zip(curves, looks, ends, placed, strict=True):
        x = curve.points[-1].eps
        axes.annotate(
            _plain(curve.label),
            xy=(x, end),
            xytext=(right + 0.03 * right, y),
            va="center",
            fontsize=9,
            color=LIGHT[style.slot],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": LIGHT[style.slot],
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 2,
                "relpos": (0, 0.5),
            },
        )
