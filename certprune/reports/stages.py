"""Which stage of the cascade decided how many images, and its time: on the console and on the page."""

from dataclasses import dataclass
from html import escape
from typing import Any

from certifiers.stages import StageSummary, summarise_stages
from certprune.reports.ledgers import LedgerView
from certprune.reports.read import RunView
from certprune.reports.rows import Column, duration, ordered
from certprune.reports.tables import html_table

HEADINGS = ("Stage", "Asked", "Certified", "Falsified", "Wrong", "Left open", "Seconds")
WORDS = {"clean": "clean prediction", "attack": "attack (PGD)"}


def stage_rows(ledger: LedgerView) -> list[tuple[str, ...]]:
    """The cells of one ledger's table, a row for each stage, in the order the images went through them."""
    return [_cells(row) for row in stage_summaries(ledger)]


def stage_summaries(ledger: LedgerView) -> list[StageSummary]:
    """How far each stage got, in the order the images went through them."""
    return summarise_stages(ledger.verdicts, ledger.method.split("+"))


def stage_table(ledger: LedgerView) -> Any:
    """The same as a table for the console (rich)."""
    from rich.table import Table

    table = Table(header_style="bold", title=f"eps {ledger.eps:g}: who decided", title_justify="left")
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place else "left")
    for cells in stage_rows(ledger):
        table.add_row(*cells)
    return table


@dataclass(frozen=True)
class StagesRow:
    """One network's way through the cascade: a :class:`StageSummary` for each of ``stages`` that it went through."""

    label: str
    n: int
    seconds: float  # of all stages together
    stages: tuple[str, ...]  # of all networks in the table
    found: dict[str, StageSummary]

    @property
    def columns(self) -> tuple[Column, ...]:
        """How many images each stage decided; set apart, of how many, and its time."""
        return (
            Column("Network", lambda row: row.label, left=True),
            *(
                Column(WORDS.get(name, name), lambda row, name=name: _decided(row.found.get(name)))
                for name in self.stages
            ),
            Column("Left open", lambda row: f"{row.n - sum(stage.decided for stage in row.found.values()):,}"),
            Column("Time", lambda row: duration(row.seconds)),
        )


def stages_rows(run: RunView) -> list[StagesRow]:
    """A row for each network that the recipe's methods were asked about at the main eps."""
    found = []
    for variant, label in ordered(run).values():
        ledger = None if run.main_eps is None else variant.ledger(run.main_eps)
        if ledger is not None:
            found.append((label, len(ledger.verdicts), ledger.seconds, stage_summaries(ledger)))
    names = dict.fromkeys(stage.stage for *_, stages in found for stage in stages)
    return [StagesRow(*about, tuple(names), {stage.stage: stage for stage in stages}) for *about, stages in found]


def stages(run: RunView) -> str:
    """How much each stage decided at the main eps, a line for each network; folded away, each ledger's stages."""
    rows = stages_rows(run)
    text = html_table(rows)
    if rows:
        text += (
            f'<p class="note">How many images each stage decided at eps {run.main_eps:g}; where the ledger tells, of '
            "how many it was asked about, and its time for these together. Only what one stage leaves open goes to the "
            "next, and of an image only the classes that are not proven yet.</p>"
        )
    each = ""
    for variant, label in ordered(run).values():
        own = [ledger for ledger in variant.ledgers if ledger.eps == run.main_eps]
        for ledger in (*own, *variant.others):
            if any(verdict.stages for verdict in ledger.verdicts):
                way = f", {ledger.way}" if ledger in variant.others else ""
                each += f"<h3>{escape(label)}, eps {ledger.eps:g}{escape(way)}</h3>{_html(stage_rows(ledger))}"
    if each:
        text += f"<details><summary>What each stage certified and broke, ledger by ledger</summary>{each}</details>"
    return text


def _decided(stage: StageSummary | None) -> str | tuple[str, str]:
    if stage is None:
        return "0"
    asked = "" if stage.asked is None else f"of {stage.asked:,}"
    time = "" if stage.seconds is None else duration(stage.seconds)
    note = ", ".join(filter(None, (asked, time)))
    return (f"{stage.decided:,}", note) if note else f"{stage.decided:,}"


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
