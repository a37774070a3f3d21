"""Every table as rich, Markdown or HTML text, from rows of any type that has ``columns``."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from certprune.reports.rows import EPS, Column, Rate, points


def _cells(row: Any, columns: Sequence[Column]) -> list[tuple[str, str]]:
    cells = [column.cell(row) for column in columns]
    return [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]


def rich_table(rows: Sequence[Any], title: str | None = None) -> Table:
    """A table for a terminal of 80 columns: the row type's ``short`` columns, intervals below their values.

    The title defaults to what the rows share: eps, norm and number of images. An eps that differs gets a column.
    """
    columns = list(getattr(rows[0], "short", None) or rows[0].columns) if rows else []
    if len({getattr(row, "eps", None) for row in rows}) > 1 and all(
        column.heading != EPS.heading for column in columns
    ):
        columns.insert(0, EPS)
    table = Table(
        title=about(rows) if title is None else title, title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.left else "right")
    for row in rows:
        cells = _cells(row, columns)
        table.add_row(*(Text.assemble(main, ("\n" + note, "dim")) if note else Text(main) for main, note in cells))
    return table


def about(rows: Sequence[Any]) -> str:
    """What the rows share, for a title: "eps 0.1 (linf), 500 images, 95 % intervals in brackets"."""
    if not rows:
        return ""
    eps = {(row.eps, getattr(row, "norm", "linf")) for row in rows}
    images = {getattr(row, "n", None) for row in rows}
    parts = [f"eps {radius:g} ({norm})" for radius, norm in eps if len(eps) == 1]
    parts += [f"{n:,} images" for n in images if n is not None and len(images) == 1]
    return ", ".join([*parts, "95 % intervals in brackets"])


def markdown_table(rows: Sequence[Any], columns: Sequence[Column] | None = None) -> str:
    """A GitHub-flavoured Markdown table with a final newline; empty for no rows. ``columns``: default the rows' own."""
    if not rows:
        return ""
    columns = rows[0].columns if columns is None else columns
    lines = [[column.heading for column in columns], ["---" if column.left else "---:" for column in columns]]
    lines += [[f"{main} {note}".strip().replace("|", "\\|") for main, note in _cells(row, columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html_table(rows: Sequence[Any], hide: Sequence[str] = ()) -> str:
    """A ``<table>`` without the columns whose headings are in ``hide``; every text is escaped."""
    if not rows:
        return ""
    columns = [column for column in rows[0].columns if column.heading not in hide]
    head = "".join(f'<th scope="col"{_side(column)}>{escape(column.heading)}</th>' for column in columns)
    body = []
    for row in rows:
        cells = zip(columns, _cells(row, columns), strict=True)
        texts = [_html_cell(column, *cell, first=column is columns[0]) for column, cell in cells]
        body.append(f"<tr>{''.join(texts)}</tr>")
    table = f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def html_rate(rate: Rate) -> str:
    """A rate in per cent as the text of an HTML cell."""
    cell = points(rate)
    return _html_text(*cell) if isinstance(cell, tuple) else escape(cell)


def _html_text(main: str, note: str) -> str:
    return escape(main) + (f' <span class="interval">{escape(note)}</span>' if note else "")


def _html_cell(column: Column, main: str, note: str, first: bool) -> str:
    text = _html_text(main, note)
    if first:
        return f'<th scope="row"{_side(column)}>{text}</th>'
    heading = escape(column.heading, quote=True)
    return f'<td{_side(column)} data-heading="{heading}">{text}</td>'


def _side(column: Column) -> str:
    return ' class="left"' if column.left else ""
