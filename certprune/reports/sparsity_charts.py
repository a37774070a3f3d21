"""Accuracy against sparsity as charts: three small ones on the page, and the same three as a picture.

The horizontal axis is logarithmic in the weights kept, since from 90 % to 99 % is as far as from 0 % to 90 %.
"""

import io
import math
from collections.abc import Sequence
from html import escape

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from certprune.reports.look import LIGHT, NORMS, Style, percent, ticks
from certprune.reports.plot import INK, dress
from certprune.reports.read import RunView
from certprune.reports.rows import Rate
from certprune.reports.sparsity import Panel, SparsityLine, line_styles, sparsity_lines, sparsity_panels
from certprune.reports.svg import Axes, Line, line_chart, swatch

SIZE = (330, 300)
MARKED = (0.0, 0.9, 0.99, 0.5, 0.95, 0.8, 0.999, 0.998, 0.995)  # sparsities worth a tick, the most telling first


def sparsity_section(run: RunView) -> str:
    """The charts of one run at its main eps; empty unless some way of pruning was certified at several sparsities."""
    lines = sparsity_lines(run)
    if not lines:
        return ""
    looks = line_styles(lines)
    charts = "".join(
        f"<div>{line_chart(_drawn(lines, looks, panel), _axes(lines, panel), *SIZE, direct=False)}</div>"
        for panel in sparsity_panels(run)
    )
    legend = "".join(
        f"<li>{swatch(style, marker=not line.level)}{escape(line.label)}</li>"
        for line, style in zip(lines, looks, strict=True)
    )
    return (
        f'<figure><div class="panels">{charts}</div><ul class="legend">{legend}</ul>'
        f"<figcaption>{escape(_caption(run, lines))}</figcaption></figure>"
    )


def sparsity_figure(run: RunView) -> bytes | None:
    """The same charts as a PNG; None where there is nothing to draw."""
    lines = sparsity_lines(run)
    if not lines:
        return None
    looks, panels = line_styles(lines), sparsity_panels(run)
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(10.5, 0.7 + 3.4 * rows), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, min(len(panels), 3), sharey=True, squeeze=False).flatten()
    for axes, panel in zip(places, panels, strict=False):
        for line, style in zip(lines, looks, strict=True):
            _plot(axes, line, style, panel, _ends(lines))
        _dress(axes, lines, panel)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    known = [axes.get_legend_handles_labels() for axes in places]
    named = {text: handle for handles, texts in known for handle, text in zip(handles, texts, strict=True)}
    texts, handles = list(named), list(named.values())
    columns = min(len(texts), 4)
    figure.legend(
        handles,
        texts,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=3,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _place(sparsity: float) -> float:
    """Where a sparsity stands on the axis: decades of weights removed."""
    return -math.log10(1 - sparsity)


def _ends(lines: Sequence[SparsityLine]) -> tuple[float, float]:
    """Where the axis begins and ends: at the dense network, unless all that is pruned is pruned hard."""
    places = [_place(point.sparsity) for line in lines if not line.level for point in line.points]
    low, high = min(places), max(places)
    return (0.0, high) if low < _place(0.75) or low == high else (low - 0.1 * (high - low), high)


def _range(lines: Sequence[SparsityLine]) -> tuple[float, float]:
    """One range of accuracies for all charts, so that they can be read against each other."""
    found = [rate for line in lines for point in line.points for rate in point.rates.values()]
    ends = [end for rate in found for end in (rate.lower, rate.upper)]
    room = 0.04 * (max(ends) - min(ends)) or 0.05
    return max(min(ends) - room, 0.0), min(max(ends) + room, 1.0)


def _marks(lines: Sequence[SparsityLine], count: int) -> list[float]:
    """At most ``count`` sparsities to put a tick at: round ones, as far as the lines go (give or take rounding)."""
    low, high = _ends(lines)
    return sorted([mark for mark in MARKED if low <= _place(mark) <= high + 0.02][:count])


def _axes(lines: Sequence[SparsityLine], panel: Panel) -> Axes:
    return Axes(
        x_label="weights removed",
        y_label=panel.title,
        x_format=lambda place: percent(1 - 10**-place),
        y_format=lambda value: f"{100 * value:.1f}".removesuffix(".0") + " %",
        x_range=_ends(lines),
        y_range=_range(lines),
        x_ticks=tuple(min(_place(mark), _ends(lines)[1]) for mark in _marks(lines, 5)),
    )


def _drawn(lines: Sequence[SparsityLine], looks: Sequence[Style], panel: Panel) -> list[Line]:
    return [_line(line, style, panel, _ends(lines)) for line, style in zip(lines, looks, strict=True)]


def _line(line: SparsityLine, style: Style, panel: Panel, ends: tuple[float, float]) -> Line:
    xs, found = _values(line, panel, ends)
    values = [rate.value for rate in found]
    if line.level:
        return Line(line.label, xs, values, style, points=False, width=1.5)
    band = {"lower": [rate.lower for rate in found], "upper": [rate.upper for rate in found]}
    return Line(line.label, xs, values, style, **band, width=1.8)


def _values(line: SparsityLine, panel: Panel, ends: tuple[float, float]) -> tuple[list[float], list[Rate]]:
    """Places and accuracies, those that were measured; a level goes from edge to edge."""
    held = [(point, point.rates[panel.key]) for point in line.points if panel.key in point.rates]
    if line.level and held:
        return list(ends), [held[0][1]] * 2
    return [_place(point.sparsity) for point, _ in held], [rate for _, rate in held]


def _caption(run: RunView, lines: Sequence[SparsityLine]) -> str:
    norms = [ledger.norm for variant in run.variants for ledger in variant.ledgers]
    where = f"At eps {run.main_eps:g} in {NORMS.get(norms[0], norms[0])}, with" if norms else "With"
    text = f"{where} 95 % Wilson bands; the axis is logarithmic in the weights kept. "
    if any(panel.sigma is not None for panel in sparsity_panels(run)):
        text += "Accuracy under noise and ℓ2 radii are those of the smoothed classifier. "
    if any(line.network.objective for line in lines):
        text += "Colour tells the objective that scores were learned against. "
    if not (run.config.get("finetune") or {}).get("epochs", True):
        text += "No network was finetuned: these are the pretrained weights, less those that were removed."
    return text


def _plot(axes, line: SparsityLine, style: Style, panel: Panel, ends: tuple[float, float]) -> None:
    xs, found = _values(line, panel, ends)
    if not xs:
        return
    colour = LIGHT[style.slot]
    dash = (0, tuple(on / 2 for on in style.dash)) if style.dash else "solid"
    look = {"color": colour, "linestyle": dash, "linewidth": 1.6, "label": line.label.replace("$", r"\$")}
    if not line.level:
        axes.fill_between(xs, [r.lower for r in found], [r.upper for r in found], color=colour, alpha=0.1, linewidth=0)
        look |= {"marker": style.marker, "markersize": 4}
    axes.plot(xs, [rate.value for rate in found], clip_on=False, **look)


def _dress(axes, lines: Sequence[SparsityLine], panel: Panel) -> None:
    low, high = _range(lines)
    axes.set_ylim(low, high)
    axes.set_yticks(ticks(low, high, 5))
    axes.set_xlim(*_ends(lines))
    marks = _marks(lines, 6)
    axes.set_xticks([min(_place(mark), _ends(lines)[1]) for mark in marks], [percent(mark) for mark in marks])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=" %"))
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("weights removed", color=INK)
    dress(axes)
