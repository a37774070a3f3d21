"""Which stage of the cascade decided how many images, and its time: on the console and on the page."""

from html import escape
from typing import Any

from certifiers.stages import StageSummary, summarise_stages
from certprune.reports.read import LedgerView, RunView
from certprune.reports.rows import ordered

HEADINGS = ("Stage", "Asked", "Certified", "Falsified", "Wrong", "Left open", "Seconds")
WORDS = {"clean": "clean prediction", "attack": "attack (PGD)"}


def stage_rows(ledger: LedgerView) -> list[tuple[str, ...]]:
    """The cells of one ledger's table, a row for each stage, in the order the images went through them."""
    return [_cells(row) for row in summarise_stages(ledger.verdicts, ledger.method.split("+"))]


def stage_table(ledger: LedgerView) -> Any:
    """The same as a table for the console (rich)."""
    from rich.table import Table

    table = Table(header_style="bold", title=f"eps {ledger.eps:g}: who decided", title_justify="left")
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place else "left")
    for cells in stage_rows(ledger):
        table.add_row(*cells)
    return table


def stages(run: RunView) -> str:
    """A table for each network at the main eps and by other methods, where the ledgers tell the stages' times."""
    text = ""
    for variant, label in ordered(run).values():
        own = [ledger for ledger in variant.ledgers if ledger.eps == run.main_eps]
        for ledger in (*own, *variant.others):
            if not any(verdict.stages for verdict in ledger.verdicts):
                continue
            text += f"<h3>{escape(label)}, eps {ledger.eps:g}</h3>{_html(stage_rows(ledger))}"
    if not text:
        return ""
    return (
        "<details><summary>How many images each stage was asked about and decided, and its time</summary>"
        f'{text}</details><p class="note">Only what one stage leaves open goes to the next, and of an image only the '
        "classes that are not proven yet. Seconds are those of all images together.</p>"
    )


def _cells(row: StageSummary) -> tuple[str, ...]:
    counts = (row.certified, row.falsified, row.misclassified, row.left)
    return (
        WORDS.get(row.stage, row.stage),
        "" if row.asked is None else f"{row.asked:,}",
        *(f"{count:,}" if count else "" for count in counts),
        "" if row.seconds is None else f"{row.seconds:,.2f}",
    )


def _html(rows: list[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col"{"" if place else _LEFT}>{text}</th>' for place, text in enumerate(HEADINGS))
    body = "".join(
        f'<tr><th scope="row" class="left">{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_LEFT = ' class="left"'
