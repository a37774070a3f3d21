"""What a run's ledgers of radii sum up to: how far images are certified, and how many of them at the recipe's eps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from certifiers.verdict import Accuracy, Status
from certprune.reports.ledgers import RadiusView
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import NONE, SIZE_COLUMNS, Column, Rate, duration, ordered, points, rate

STEPS = (0.25, 0.5, 0.75, 1.0)  # of the largest eps: where a run that certified at no eps shows accuracies
DIGITS = 4


@dataclass(frozen=True)
class RadiusRow:
    """The certified radii of one network (in ``norm``, pixels; ``largest``: up to which eps was looked).

    ``median``: at which half of all ``n`` images are certified still, 0 if not so many are; ``mean`` over all images,
    wrong ones with 0. ``certified`` has a rate for each of ``radii``. Times in seconds.
    """

    run: str
    seed: int | None
    variant: str
    label: str
    sparsity: float | None
    kept: int | None
    norm: str
    method: str
    largest: float
    tolerance: float
    n: int
    median: float
    mean: float
    radii: tuple[float, ...]
    certified: tuple[Rate, ...]
    certification_seconds: float

    @property
    def columns(self) -> tuple[Column, ...]:
        """Accuracies in per cent, headed by their eps; radii rounded down."""
        return (
            Column("Network", lambda row: row.label, left=True),
            SIZE_COLUMNS[0],
            Column("Images", lambda row: f"{row.n:,}"),
            Column("Half up to", lambda row: rounded_down(row.median)),
            Column("Mean", lambda row: rounded_down(row.mean)),
            *(
                Column(f"eps {radius:g}", lambda row, place=place: points(row.certified[place]))
                for place, radius in enumerate(self.radii)
            ),
            Column("Certifying", lambda row: duration(row.certification_seconds)),
        )


def radius_rows(run: RunView) -> list[list[RadiusRow]]:
    """One row per network, a list for each way of finding radii: by the recipe's methods first, then the furthest.

    In each the networks are in the order of reports: not pruned first, then by rising sparsity.
    """
    found: dict[tuple, list[RadiusRow]] = {}
    for variant, label in ordered(run).values():
        for view in variant.radii:
            way = (not view.usual, -view.largest, view.settings)
            found.setdefault(way, []).append(_row(run, variant, view, label))
    return [found[way] for way in sorted(found)]


def shown_eps(run: RunView, largest: float) -> tuple[float, ...]:
    """The eps at which tables and charts of radii show certified accuracy: the run's own, as far as was looked."""
    own = tuple(eps for eps in run.eps_grid if 0 < eps <= largest)
    return own or tuple(step * largest for step in STEPS)


def rounded_down(radius: float) -> str:
    """A radius as text that claims no more than was certified."""
    return NONE if math.isnan(radius) else f"{math.floor(radius * 10**DIGITS) / 10**DIGITS:.{DIGITS}f}"


def certified_at(view: RadiusView, eps: float) -> Accuracy:
    """The share of images that are certified at ``eps``, up to what the network's float type makes of that number."""
    return Accuracy(sum(radius >= eps * (1 - 1e-7) for radius in view.claims().values()), len(view.rows))


def _row(run: RunView, variant: Variant, view: RadiusView, label: str) -> RadiusRow:
    size, radii = variant.size or {}, shown_eps(run, view.largest)
    each = _each(view)
    return RadiusRow(
        run=run.name,
        seed=run.seed,
        variant=variant.name,
        label=label,
        sparsity=size.get("total", view.header.get("sparsity")),
        kept=size.get("kept"),
        norm=view.norm,
        method=view.method,
        largest=view.largest,
        tolerance=float(view.header["tolerance"]),
        n=len(each),
        median=each[math.ceil(len(each) / 2) - 1],
        mean=sum(each) / len(each),
        radii=radii,
        certified=tuple(rate(certified_at(view, eps)) for eps in radii),
        certification_seconds=view.seconds,
    )


def _each(view: RadiusView) -> Sequence[float]:
    """The certified radius of every image, the largest first; 0 where none is certified."""
    return sorted((row.radius if row.status is Status.certified else 0.0 for row in view.rows), reverse=True)
