"""What a run achieved, as HTML: the sentence, headline figures, summary table, curve, paired differences.

Every function takes a run that may be unfinished and returns an empty string where there is nothing to show.
"""

from dataclasses import replace
from html import escape

from certprune.reports.asked import asked_count, fewer, of_asked
from certprune.reports.compare import BASELINES, differences
from certprune.reports.look import NORMS, chosen_by, percent, styles
from certprune.reports.read import RunView
from certprune.reports.rows import Rate, Row, network, points, summary_rows
from certprune.reports.smoothed import smoothing_settings
from certprune.reports.tables import html_table
from certprune.reports.together import together_rows

CARDS = 8  # more figures in large print are no headline


def sentence(run: RunView) -> str:
    """What this run is, in plain words (not escaped)."""
    config = run.config
    objective = config.get("objective", {})
    trained = f"trained with {objective.get('name', 'an unnamed objective')}"
    if objective.get("eps") is not None:
        trained += f" at eps {objective['eps']:g}"
    elif objective.get("sigma") is not None:
        trained += f" under noise of sigma {objective['sigma']:g}"
    text = f"{_name(config, 'model')} on {_name(config, 'data')}, {trained}"
    pruned = [variant for variant in run.variants if variant.sparsity and variant.criterion]
    if pruned:
        levels = sorted({variant.sparsity for variant in pruned})
        criteria = dict.fromkeys(chosen_by(replace(network(variant), budget=None)) for variant in pruned)
        text += f", pruned to {listed(percent(level, 2) for level in levels)} sparsity by {listed(criteria)}"
    ledgers = [ledger for variant in run.variants for ledger in variant.ledgers]
    smoothed = [view for variant in run.variants for view in variant.smoothed]
    if smoothed and not ledgers:
        images, split = max(len(view.verdicts) for view in smoothed), smoothed[0].header.get("split", "test")
        images = of_asked(images, asked_count(config, smoothing_settings(config)))
        return f"{text}; certified by randomized smoothing on {images} {split} images. Seed {run.seed}."
    if not ledgers:
        return f"{text}. Nothing is certified yet."
    images = of_asked(max(len(ledger.verdicts) for ledger in ledgers), asked_count(config))
    split = ledgers[0].header.get("split", "test")
    many = ", each at several eps" if len(run.eps_grid) > 1 else ""
    return f"{text}; certified on {images} {split} images{many}. Seed {run.seed}."


def headline(run: RunView) -> str:
    """One card for the dense network and one for the learned criterion at each sparsity, at the main eps."""
    rows = summary_rows(run, run.main_eps) if run.main_eps is not None else []
    learned = any(row.criterion and row.criterion not in BASELINES for row in rows)
    chosen = [row for row in rows if not (learned and row.criterion in BASELINES) and row.variant != "pretrain"]
    if not chosen:
        return ""
    gaps = differences([run])
    by_name = dict(zip((row.variant for row in rows), styles(_networks(run, rows)), strict=True))
    cards = "".join(_card(run, row, gaps, by_name[row.variant].slot) for row in chosen[:CARDS])
    return f'<div class="cards">{cards}</div>'


def _card(run: RunView, row: Row, gaps, slot: int) -> str:
    kept = f"{row.kept:,} of {row.weights:,} weights" if row.kept is not None and row.weights else ""
    against = [gap for gap in gaps if gap.variant == row.variant]
    lines = [kept] + [f"{points(gap.certified, sign=True)[0]} points against {gap.second}" for gap in against]
    return card(row.label, row.certified, f"certified at eps {row.eps:g}", lines, slot)


def card(heading: str, certified: Rate, what: str, lines: list[str], slot: int) -> str:
    """A figure in large print; ``lines`` (those that are not empty) stand below it."""
    low, high = 100 * certified.lower, 100 * certified.upper
    return (
        f'<div class="card s{slot}"><div class="what">{escape(heading)}</div>'
        f'<div class="figure">{100 * certified.value:.1f}<small> %</small></div>'
        f"<p>{escape(what)} [{low:.1f}, {high:.1f}]</p>"
        + "".join(f"<p>{escape(line)}</p>" for line in lines if line)
        + "</div>"
    )


def summary(run: RunView) -> str:
    """The table at the main eps, then the other eps folded away."""
    if run.main_eps is None:
        return ""
    hide = ("eps",)
    rows = summary_rows(run, run.main_eps)
    text = html_table(rows, hide) + f'<p class="note">{escape(_about(run, rows))}</p>'
    others = [eps for eps in run.eps_grid if eps != run.main_eps]
    if others:
        tables = "".join(f"<h3>eps {eps:g}</h3>{html_table(summary_rows(run, eps), hide)}" for eps in others)
        radii = listed(f"{eps:g}" for eps in others)
        text += f"<details><summary>The same at eps {radii}</summary>{tables}</details>"
    return text


def other_methods(run: RunView) -> str:
    """Certificates by other methods than the recipe's, a table for each."""
    rows = summary_rows(run, others=True)
    groups = dict.fromkeys((row.method, row.eps) for row in rows)
    note = fewer((row.n for row in rows), asked_count(run.config)) if rows else ""
    return "".join(
        f"<h3>{escape(method)}, eps {eps:g}</h3>"
        + html_table([row for row in rows if (row.method, row.eps) == (method, eps)], hide=("eps",))
        for method, eps in groups
    ) + (f'<p class="note">{escape(note.strip())}</p>' if note else "")


def together(run: RunView) -> str:
    """What all ledgers prove together, a table for each eps at which that is more than the summary says."""
    found = together_rows(run)
    if not found:
        return ""
    text = ""
    for eps, rows in found.items():
        ways = listed(dict.fromkeys(way for row in rows for way in row.method.split(" · ")))
        text += (
            f"<h3>eps {eps:g}</h3>{html_table(rows, hide=('eps', 'Weights kept', 'Training', 'Certifying'))}"
            f'<p class="note">By {escape(ways)}.</p>'
        )
    return text + (
        '<p class="note">An image counts as certified if any of these proved it at this eps or a larger one, and as '
        "broken if any found a wrong prediction at this eps or a smaller one; none contradicts another. Networks that "
        "were put to more methods than others look better for it: compare them by the summary.</p>"
    )


def _about(run: RunView, rows: list[Row]) -> str:
    first = rows[0]
    text = f"At eps {first.eps:g} in {NORMS.get(first.norm, first.norm)}; in brackets, 95 % Wilson intervals."
    if run.pretrain and run.pretrain.seconds:
        text += f" Training is each network's own; all share {run.pretrain.seconds:,.0f} s of pretraining."
    if len({row.n for row in rows}) > 1:
        text += " The networks were not certified on equally many images: do not compare them yet."
    return text


def paired(run: RunView) -> str:
    """The paired differences over images at the main eps."""
    gaps = differences([run])
    if not gaps:
        return ""
    return (
        html_table(gaps, hide=("eps",))
        + '<p class="note">Certified accuracy of the network less that of the one it is '
        f"compared with, at eps {gaps[0].eps:g}, on the same images. In brackets, a 95 % interval for paired "
        "proportions; one that leaves out 0 is a difference that these images can tell.</p>"
    )


def _networks(run: RunView, rows: list[Row]):
    return [network(run.variant(row.variant)) for row in rows]


def _name(config: dict, key: str) -> str:
    value = config.get(key)
    return str(value.get("name", f"an unnamed {key}")) if isinstance(value, dict) else str(value or f"an unnamed {key}")


def listed(items) -> str:
    """One, two and three."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
