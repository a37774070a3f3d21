"""What a run's smoothing ledgers sum up to: certified accuracy at the recipe's radii, and paired differences there."""

from collections.abc import Sequence
from dataclasses import dataclass

from certifiers.verdict import Accuracy, Status
from certprune.reports.compare import Difference, alike, counted, names, paired_rate, pairs_to_compare
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import (
    SIZE_COLUMNS,
    TIME_COLUMNS,
    Column,
    Rate,
    chosen_by,
    network,
    ordered,
    points,
    rate,
)
from certprune.reports.smoothed import SmoothedView, accuracy_at, ledger_at, shown_radii, smoothing_settings


@dataclass(frozen=True)
class SmoothedRow:
    """One network certified by smoothing with one sigma.

    ``certified`` has a rate for each of ``radii`` (in ``norm``, pixels).
    ``n`` counts images, ``samples`` the noisy copies allowed for each, ``drawn`` those drawn, on average; ``rule``
    says when sampling stopped early, "" if never. Times in seconds.
    """

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
    sigma: float
    n0: int | None
    samples: int | None
    alpha: float | None
    n: int
    radii: tuple[float, ...]
    certified: tuple[Rate, ...]
    abstained: Rate
    training_seconds: float | None
    certification_seconds: float
    norm: str = "l2"
    rule: str = ""
    drawn: float | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """Accuracies in per cent, headed by their radius."""
        return (
            Column("Network", lambda row: row.label, left=True),
            *SIZE_COLUMNS,
            Column("Images", lambda row: f"{row.n:,}"),
            *_radius_columns(self.radii),
            Column("Abstained", lambda row: points(row.abstained)),
            *TIME_COLUMNS,
        )

    @property
    def short(self) -> tuple[Column, ...]:
        """For a terminal: without intervals."""
        plain = [
            Column(f"r = {radius:g}", lambda row, place=place: points(row.certified[place])[0])
            for place, radius in enumerate(self.radii)
        ]
        seconds = Column("Seconds", lambda row: f"{(row.training_seconds or 0) + row.certification_seconds:.0f}")
        return (SIZE_COLUMNS[0], Column("Chosen by", lambda row: row.chosen_by, left=True), *plain, seconds)

    @property
    def settings(self) -> tuple:
        return (self.sigma, self.n0, self.samples, self.alpha, self.norm, self.rule)


def _radius_columns(radii: Sequence[float]) -> list[Column]:
    return [
        Column(f"r = {radius:g}", lambda row, place=place: points(row.certified[place]))
        for place, radius in enumerate(radii)
    ]


def smoothed_rows(run: RunView) -> list[list[SmoothedRow]]:
    """One row per network, a list for each way of smoothing (sigma, n0, n, alpha): the recipe's own first.

    In each the networks are in the order of reports: not pruned first, then by rising sparsity.
    """
    networks = ordered(run).values()
    budgets = len({variant.budget for variant, _ in networks if variant.budget}) > 1
    main = smoothing_settings(run.config).get("sigma")
    found: dict[tuple, list[SmoothedRow]] = {}
    for variant, label in networks:
        for view in variant.smoothed:
            way = (not (view.usual and view.sigma == main), not view.usual, view.settings)
            found.setdefault(way, []).append(_row(run, variant, view, label, budgets))
    return [found[way] for way in sorted(found, key=str)]


def main_radius(radii: Sequence[float]) -> float:
    """The radius that cards and differences are about: the smallest that is shown above 0."""
    return min((radius for radius in radii if radius > 0), default=0.0)


def smoothed_differences(run: RunView, sigma: float) -> list[Difference]:
    """Paired differences over images in certified accuracy at :func:`main_radius`; ``eps`` of the rows is that radius.

    Of the ledgers at ``sigma`` by the recipe's n0, n and alpha.
    """
    radius = main_radius(shown_radii(run.config))
    found = []
    for first, second in pairs_to_compare(run):
        one, other = ledger_at(first.smoothed, sigma), ledger_at(second.smoothed, sigma)
        if one is None or other is None or not alike(one, other):
            continue
        only_one, only_other, n = counted(_held(one, radius), _held(other, radius))
        if n:
            gap = paired_rate(only_one, only_other, n)
            found.append(Difference(*names(run, first, second), radius, "images", n, gap, only_one, only_other))
    return found


def _held(view: SmoothedView, radius: float) -> dict[int, bool]:
    return {v.index: v.status is Status.certified and v.radius >= radius for v in view.verdicts}


def _row(run: RunView, variant: Variant, view: SmoothedView, label: str, budgets: bool) -> SmoothedRow:
    size, header, n = variant.size or {}, view.header, len(view.verdicts)
    radii = shown_radii(run.config)
    abstained = sum(verdict.status is Status.abstained for verdict in view.verdicts)
    return SmoothedRow(
        run=run.name,
        seed=run.seed,
        variant=variant.name,
        label=label,
        chosen_by=chosen_by(network(variant), budgets),
        criterion=variant.criterion,
        budget=variant.budget,
        sparsity=size.get("total", header.get("sparsity")),
        kept=size.get("kept"),
        weights=size.get("weights"),
        sigma=view.sigma,
        n0=header.get("n0"),
        samples=header.get("n"),
        alpha=header.get("alpha"),
        n=n,
        radii=radii,
        certified=tuple(rate(accuracy_at(view, radius)) for radius in radii),
        abstained=rate(Accuracy(abstained, n)),
        training_seconds=variant.seconds,
        certification_seconds=view.seconds,
        norm=view.norm,
        rule=view.rule,
        drawn=_drawn(view),
    )


def _drawn(view: SmoothedView) -> float | None:
    counts = [view.header.get("n") if v.samples is None else v.samples for v in view.verdicts]
    return None if None in counts else sum(counts) / len(counts)
