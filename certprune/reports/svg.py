"""Line charts as small inline SVG: text and axes take the page's colours, so light and dark both read well.

Colours are the CSS variables ``--s0`` to ``--s7`` of the page (see ``style.py``); nothing is fetched, nothing has an
id, and every point names its value in a ``<title>``, which browsers show on hover and screen readers read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from certprune.reports.look import Style, spread, ticks

FONT = 13  # px, at the chart's natural width
CHARACTER = 6.9  # px, mean width of a character at that size


@dataclass(frozen=True)
class Line:
    """One series. ``lower`` and ``upper`` draw a band; ``hollow`` are indices of points drawn as rings."""

    label: str
    xs: list[float]
    ys: list[float]
    style: Style
    lower: list[float] | None = None
    upper: list[float] | None = None
    points: bool | tuple[int, ...] = True  # all, none, or which
    width: float = 2.0


@dataclass(frozen=True)
class Axes:
    """The frame of a chart. Formats turn a tick or a value into text."""

    x_label: str
    y_label: str
    x_format: Callable[[float], str] = "{:g}".format
    y_format: Callable[[float], str] = "{:g}".format
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    y_limit: tuple[float, float] = (float("-inf"), float("inf"))  # padding never passes these
    x_ticks: tuple[float, ...] | None = None
    marks: tuple[tuple[float, str], ...] = ()  # vertical lines with a caption


def line_chart(lines: list[Line], axes: Axes, width: int, height: int, *, direct: bool = True, title: str = "") -> str:
    """An ``<svg>`` of ``lines``. ``direct`` writes each label at its line's end, instead of leaving it to a legend."""
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    longest = max(len(line.label) for line in lines)
    right = 14 + (longest * CHARACTER + 12 if direct else 0)
    x_low, x_high, y_low, y_high = _ranges(lines, axes)
    y_ticks = ticks(y_low, y_high, max(3, height // 55))
    left = 14 + CHARACTER * max(len(axes.y_format(tick)) for tick in y_ticks)
    top, bottom = 30, height - 40

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    frame = _frame(axes, y_ticks, x_low, x_high, at_x, at_y, (left, width - right, top, bottom))
    bands = [_band(line, at_x, at_y) for line in lines]
    paths = [_path(line, axes, at_x, at_y) for line in lines]
    ends = _end_labels(lines, at_x, at_y, top, bottom) if direct else []
    name = escape(title or f"{axes.y_label} against {axes.x_label}", quote=True)
    return (
        f'<svg class="chart" role="img" aria-label="{name}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(frame + bands + paths + ends)}</svg>'
    )


def swatch(style: Style, marker: bool = True) -> str:
    """A short piece of a line, for legends."""
    return (
        f'<svg class="swatch s{style.slot}" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<path d="M1 6H33" {_stroke(style, 2)}/>{_marker(style, 17, 6) if marker else ""}</svg>'
    )


def _ranges(lines: list[Line], axes: Axes) -> tuple[float, float, float, float]:
    xs = [x for line in lines for x in line.xs]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if axes.x_range:
        x_low, x_high = axes.x_range
    if axes.y_range:
        return x_low, x_high, *axes.y_range
    ys = [y for line in lines for y in (*line.ys, *(line.lower or ()), *(line.upper or ()))]
    y_low, y_high = min(ys), max(ys)
    pad = 0.06 * (y_high - y_low) or 0.1 * abs(y_high) or 0.5
    return x_low, x_high, max(y_low - pad, axes.y_limit[0]), min(y_high + pad, axes.y_limit[1])


def _frame(axes: Axes, y_ticks, x_low, x_high, at_x, at_y, box) -> list[str]:
    left, right, top, bottom = box
    parts = []
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(axes.y_format(tick))}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom}H{right:.1f}"/>')
    fit = int((right - left) / 45)
    x_ticks = [tick for tick in axes.x_ticks or () if x_low <= tick <= x_high]
    if not x_ticks or len(x_ticks) > fit:
        x_ticks = ticks(x_low, x_high, max(2, min(8, fit)))
    for tick in x_ticks:
        x = at_x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(axes.x_format(tick))}</text>')
    for where, caption in axes.marks:
        if x_low <= where <= x_high:
            x = at_x(where)
            parts.append(f'<path class="mark" d="M{x:.1f} {top}V{bottom}"/>')
            anchor, shift = ("end", -5) if x > (left + right) / 2 else ("start", 5)
            parts.append(
                f'<text class="quiet" x="{x + shift:.1f}" y="{top - 5}" text-anchor="{anchor}">{escape(caption)}</text>'
            )
    parts.append(f'<text class="name" x="0" y="13">{escape(axes.y_label)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 36}" text-anchor="middle">{escape(axes.x_label)}</text>')
    return parts


def _band(line: Line, at_x, at_y) -> str:
    if not line.lower or not line.upper:
        return ""
    there = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in zip(line.xs, line.upper, strict=True)]
    back = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in zip(line.xs, line.lower, strict=True)]
    return f'<path class="band s{line.style.slot}" d="M{"L".join(there + back[::-1])}Z"/>'


def _path(line: Line, axes: Axes, at_x, at_y) -> str:
    where = [(at_x(x), at_y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
    chosen = range(len(where)) if line.points is True else (line.points or ())
    dots = []
    for index in chosen:
        text = f"{line.label}: {axes.y_format(line.ys[index])} at {axes.x_format(line.xs[index])}"
        if line.lower and line.upper:
            text += f" [{axes.y_format(line.lower[index])}, {axes.y_format(line.upper[index])}]"
        dots.append(_marker(line.style, *where[index], text))
    return f'<g class="s{line.style.slot}"><path d="M{path}" {_stroke(line.style, line.width)}/>{"".join(dots)}</g>'


def _stroke(style: Style, width: float) -> str:
    dash = f' stroke-dasharray="{" ".join(f"{on:g}" for on in style.dash)}"' if style.dash else ""
    return f'class="line" stroke-width="{width:g}"{dash}'


def _marker(style: Style, x: float, y: float, text: str = "") -> str:
    title = f"<title>{escape(text)}</title>" if text else ""
    if style.marker == "o":
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if style.marker == "D" else ""
    return f'<rect class="dot" x="{x - 2.9:.1f}" y="{y - 2.9:.1f}" width="5.8" height="5.8"{turn}>{title}</rect>'


def _end_labels(lines: list[Line], at_x, at_y, top: float, bottom: float) -> list[str]:
    ends = [(at_x(line.xs[-1]), at_y(line.ys[-1])) for line in lines]
    edge = max(x for x, _ in ends)
    placed = spread([y for _, y in ends], FONT + 4, top, bottom)
    parts = []
    for line, (x, y), label_y in zip(lines, ends, placed, strict=True):
        parts.append(
            f'<path class="leader s{line.style.slot}" d="M{x + 5:.1f} {y:.1f}L{edge + 14:.1f} {label_y:.1f}"/>'
        )
        parts.append(
            f'<text class="direct s{line.style.slot}" x="{edge + 17:.1f}" y="{label_y + 4:.1f}">'
            f"{escape(line.label)}</text>"
        )
    return parts
