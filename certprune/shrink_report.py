"""What ``certprune shrink`` found, as a page, a CSV and a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from certprune.shrinking import Shrunk, Try

ASKED = "Weights asked for"  # as the network's name says
WITHIN = 1.2  # the usual end of a search
HEADINGS = ("Network", ASKED, "Weights", "Images", "Clean", "Certified", "Keeps it")


def page_name(
    target: float, eps: float, like: str | None = None, within: float = WITHIN, count: int | None = None
) -> str:
    """The name of the page of a search, without its end; what is not as usual is in it, so that none is lost.

    ``like``: None for the run's usual variant.
    """
    name = f"shrink-{target:g}-eps-{eps:g}"
    name += "" if like is None else f"-like-{like}"
    name += "" if within == WITHIN else f"-within-{within!r}".removesuffix(".0")
    return name + ("" if count is None else f"-count-{count}")


def _row(one: Try, found: Shrunk) -> tuple[str, ...]:
    asked = f"{100 * one.kept:g} %"
    if one.found is None:
        return one.variant, asked, "none", "", "", "", "cannot be made"
    keeps = "yes, chosen" if one is found.chosen else "yes" if one.holds(found.target) else "no"
    held = one.found
    return one.variant, asked, f"{one.weights:,}", f"{held.n:,}", str(held.clean), str(held.certified), keeps


def shrink_table(found: Shrunk) -> Table:
    """The tries for a terminal of 80 columns, intervals below their values."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"Certified accuracy of {100 * found.target:g} % or more at eps {found.eps:g}, validation images"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    for place, heading in enumerate(HEADINGS):
        if heading != ASKED:
            table.add_column(heading, justify="right" if 0 < place < len(HEADINGS) - 1 else "left", overflow="fold")
    for one in found.tries:
        cells = dict(zip(HEADINGS, _row(one, found), strict=True))
        table.add_row(*(cell.replace(" [", "\n[") for heading, cell in cells.items() if heading != ASKED))
    return table


def outcome(found: Shrunk) -> str:
    """The result in a sentence or two."""
    if found.chosen is None:
        measured = [one for one in found.tries if one.found is not None]
        best = max(measured, key=lambda one: one.found.certified.value, default=None)
        said = "" if best is None else f" The nearest is {best.variant} with {best.found.certified}."
        return (
            f"No network that was tried keeps {100 * found.target:g} %.{said} Lower --certified-at-least, train the "
            "run's networks for longer, or give another variant to go by with --like."
        )
    less = found.dense.multiply_adds / max(found.cost.multiply_adds, 1)
    return (
        f"The smallest is {found.chosen.variant} with {found.chosen.weights:,} weights. Compacted it does {less:.1f} "
        f"times fewer multiply-adds than the dense network ({found.cost.multiply_adds:,}). On {found.test.n:,} test "
        f"images, certified once: {found.test.certified} (clean {found.test.clean})."
    )


def shrink_page(found: Shrunk, command: str) -> str:
    """The report in Markdown."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 2), "---"), *(_row(one, found) for one in found.tries)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{one.variant}: {one.note}\n" for one in found.tries if one.note)
    where = "" if found.network is None else f"\nThe compacted network: `{found.network}`.\n"
    return f"""# The smallest network that keeps {100 * found.target:g} % certified at eps {found.eps:g}

Made by `{command}`. {outcome(found)}
{where}
Accuracies below are of validation images, by which the network was chosen among {len(found.tries)}; in brackets 95 %
intervals. The accuracy to go by is that on the test images, which had no part in it.

{table}
{notes}"""


def shrink_csv(found: Shrunk) -> str:
    """One line a try: ``variant,kept,weights,images,clean,certified,holds``."""
    lines = ["variant,kept,weights,images,clean,certified,holds"]
    for one in found.tries:
        held = one.found
        figures = ",," if held is None else f"{held.n},{held.clean.value:.6f},{held.certified.value:.6f}"
        lines.append(f"{one.variant},{one.kept:g},{one.weights},{figures},{int(one.holds(found.target))}")
    return "\n".join(lines) + "\n"
