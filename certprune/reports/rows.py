"""Summary rows of a run: the figures that every table shows, computed from its ledgers and stage records.

Accuracies are fractions; an interval stands beside each. A row type carries its ``columns``, all that the renderers
in ``tables.py`` know of it, so a new kind of row is one dataclass.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from certifiers.verdict import Accuracy, Summary
from certprune.reports.ledgers import LedgerView, same_eps
from certprune.reports.look import Network, chosen_by, labels, order, percent
from certprune.reports.read import RunView, Variant

NONE = "–"


@dataclass(frozen=True)
class Rate:
    """A fraction with its 95 % interval (both None where no interval can be given)."""

    value: float
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Column:
    """One column: a heading and how a row's cell reads. A cell may be (main, interval) to set the interval apart."""

    heading: str
    cell: Callable[[Any], str | tuple[str, str]]
    left: bool = False


def points(rate: Rate | None, sign: bool = False) -> str | tuple[str, str]:
    """A rate in per cent (or percentage points, with ``sign``) and its interval."""
    if rate is None:
        return NONE
    form = "{:+.1f}" if sign else "{:.1f}"
    texts = (form.format(100 * end) for end in (rate.value, rate.lower, rate.upper) if end is not None)
    middle, *ends = ("0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}") for text in texts)
    return (middle, f"[{', '.join(end.replace('100.0', '100') for end in ends)}]") if ends else middle


def duration(seconds: float | None) -> str:
    """12.3 -> "12 s", 754 -> "12 min 34 s"; short times keep one decimal."""
    if seconds is None:
        return NONE
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


EPS = Column("eps", lambda row: f"{row.eps:g}")
SIZE_COLUMNS = (
    Column("Sparsity", lambda row: NONE if row.sparsity is None else percent(row.sparsity, 2)),
    Column("Weights kept", lambda row: NONE if row.kept is None else f"{row.kept:,.0f}"),
)
ACCURACY_COLUMNS = (
    Column("Clean %", lambda row: points(row.clean)),
    Column("Attack %", lambda row: points(row.attack)),
    Column("Certified %", lambda row: points(row.certified)),
)
TIME_COLUMNS = (
    Column("Training", lambda row: duration(row.training_seconds)),
    Column("Certifying", lambda row: duration(row.certification_seconds)),
)


@dataclass(frozen=True)
class Row:
    """One network certified at one eps. Times in seconds; ``training_seconds`` is of the network's own stages."""

    run: str
    seed: int | None
    variant: str
    label: str
    chosen_by: str
    criterion: str | None
    budget: str | None
    sparsity: float | None
    kept: int | None
    weights: int | None
    eps: float
    norm: str
    method: str
    n: int
    clean: Rate
    attack: Rate
    certified: Rate
    training_seconds: float | None
    certification_seconds: float

    columns: ClassVar[tuple[Column, ...]] = (
        Column("Network", lambda row: row.label, left=True),
        *SIZE_COLUMNS,
        EPS,
        Column("Images", lambda row: f"{row.n:,}"),
        *ACCURACY_COLUMNS,
        *TIME_COLUMNS,
    )
    short: ClassVar[tuple[Column, ...]] = (
        SIZE_COLUMNS[0],
        Column("Chosen by", lambda row: row.chosen_by, left=True),
        *ACCURACY_COLUMNS,
        Column("Seconds", lambda row: f"{(row.training_seconds or 0) + row.certification_seconds:.0f}"),
    )


def rates(summary: Summary) -> tuple[Rate, Rate, Rate]:
    """Clean, attack and certified accuracy of a ledger's summary, with Wilson intervals."""
    return rate(summary.clean), rate(summary.attack), rate(summary.certified)


def rate(accuracy: Accuracy) -> Rate:
    return Rate(accuracy.value, accuracy.low, accuracy.high)


def network(variant: Variant) -> Network:
    return Network(variant.name, variant.criterion, variant.budget, variant.sparsity, variant.objective, variant.how)


def ordered(run: RunView) -> dict[str, tuple[Variant, str]]:
    """The run's networks and their labels by name: not pruned first, then by rising sparsity."""
    variants = sorted(run.variants, key=lambda variant: order(network(variant)))
    texts = labels(network(variant) for variant in variants)
    return {variant.name: (variant, text) for variant, text in zip(variants, texts, strict=True)}


def summary_rows(run: RunView, eps: float | None = None, others: bool = False) -> list[Row]:
    """One row per network and eps that has a ledger, by eps and then dense first and by rising sparsity.

    With ``eps`` only the rows of that eps. ``others``: the ledgers by other methods than the recipe's instead.
    """
    rows = network_rows(run, lambda variant: variant.others if others else variant.ledgers)
    rows = [row for row in rows if eps is None or same_eps(row.eps, eps)]
    return sorted(rows, key=lambda row: (row.eps, row.method))  # stable: networks stay in order


def network_rows(run: RunView, ledgers: Callable[[Variant], Iterable[LedgerView | None]]) -> list[Row]:
    """A row for each of the ledgers that ``ledgers`` gives of a network; dense first, then by rising sparsity."""
    networks = ordered(run).values()
    budgets = len({variant.budget for variant, _ in networks if variant.budget}) > 1
    return [
        _row(run, variant, ledger, text, budgets)
        for variant, text in networks
        for ledger in ledgers(variant)
        if ledger is not None
    ]


def _row(run: RunView, variant: Variant, ledger: LedgerView, label: str, budgets: bool) -> Row:
    size = variant.size or {}
    clean, attack, certified = rates(ledger.summary)
    return Row(
        run=run.name,
        seed=run.seed,
        variant=variant.name,
        label=label,
        chosen_by=chosen_by(network(variant), budgets),
        criterion=variant.criterion,
        budget=variant.budget,
        sparsity=size.get("total", ledger.header.get("sparsity")),
        kept=size.get("kept"),
        weights=size.get("weights"),
        eps=ledger.eps,
        norm=ledger.norm,
        method=ledger.way,
        n=len(ledger.verdicts),
        clean=clean,
        attack=attack,
        certified=certified,
        training_seconds=variant.seconds,
        certification_seconds=ledger.seconds,
    )
