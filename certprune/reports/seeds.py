"""Several runs of one recipe that differ in the seed alone: means with intervals over the seeds.

An interval over seeds answers "what would another training run give?"; the Wilson interval of one ledger answers
"what would other test images give?". They are different questions and are never mixed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from scipy import stats

from certifiers.errors import InputError
from certprune.reports.ledgers import same_eps
from certprune.reports.read import RunView
from certprune.reports.rows import (
    ACCURACY_COLUMNS,
    SIZE_COLUMNS,
    TIME_COLUMNS,
    Column,
    Rate,
    Row,
    network_rows,
)
from certprune.stage_settings import SAME_WEIGHTS, SpeedSettings

FREE = ("name", "seed", "output", "device", "threads")  # what may differ between runs of one recipe


@dataclass(frozen=True)
class SeedsRow:
    """One network at one eps over several seeds: mean rates with 95 % t-intervals (None for a single seed)."""

    variant: str
    label: str
    sparsity: float | None
    kept: float | None
    eps: float
    norm: str
    seeds: int
    n: int
    clean: Rate
    attack: Rate
    certified: Rate
    each_certified: tuple[float, ...]
    training_seconds: float | None
    certification_seconds: float

    columns: ClassVar[tuple[Column, ...]] = (
        Column("Network", lambda row: row.label, left=True),
        *SIZE_COLUMNS,
        Column("eps", lambda row: f"{row.eps:g}"),
        Column("Seeds", lambda row: str(row.seeds)),
        *ACCURACY_COLUMNS,
        Column("Images", lambda row: f"{row.n:,}"),
        *TIME_COLUMNS,
    )


def mean_rate(values: Sequence[float], bounded: bool = True) -> Rate:
    """Mean with a two-sided 95 % Student t-interval; ``bounded`` cuts it to [0, 1]. One value has no interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Rate(mean, None, None)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    low, high = mean - half, mean + half
    return Rate(mean, max(low, 0.0), min(high, 1.0)) if bounded else Rate(mean, low, high)


def recipe_of(run: RunView) -> dict:
    """What has to be equal for two runs to be the same recipe: all of the config but :data:`FREE`.

    A key that is null counts as absent, so that a setting which came up between two runs sets them apart only
    where it is used. Of ``speed`` only what trains other weights counts, and only where it is not the default.
    """
    told = _told({key: value for key, value in run.config.items() if key not in FREE})
    usual, given = SpeedSettings().model_dump(), told.pop("speed", {})
    speed = {key: value for key, value in given.items() if key not in SAME_WEIGHTS and value != usual.get(key)}
    return {**told, "speed": speed} if speed else told


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _told(item) for key, item in value.items() if item is not None}
    return [_told(item) for item in value] if isinstance(value, list) else value


def group(runs: Iterable[RunView]) -> list[list[RunView]]:
    """Runs of the same recipe together, in the order they came; runs of one seed twice are not together."""
    groups: list[list[RunView]] = []
    for run in runs:
        for members in groups:
            seeds = [member.seed for member in members]
            if recipe_of(run) == recipe_of(members[0]) and run.seed not in seeds:
                members.append(run)
                break
        else:
            groups.append([run])
    return groups


def check_same_recipe(runs: Sequence[RunView]) -> None:
    """Raise InputError unless the runs share a recipe and have different seeds."""
    if not runs:
        raise InputError("No run was given to average over. Give at least one run folder, e.g. runs/demo.")
    first = recipe_of(runs[0])
    for run in runs[1:]:
        other = recipe_of(run)
        keys = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if keys:
            raise InputError(
                f"Averages over seeds need runs of one recipe, but '{run.folder}' differs from '{runs[0].folder}' "
                f"in {', '.join(keys)}. Give only runs that differ in the seed, or report them side by side."
            )
    seeds = [run.seed for run in runs]
    for seed in seeds:
        if seeds.count(seed) > 1:
            twice = " and ".join(f"'{run.folder}'" for run in runs if run.seed == seed)
            raise InputError(f"{twice} have the same seed {seed}: they are no independent runs. Leave out one.")


def aggregate(runs: Sequence[RunView], eps: float | None = None) -> list[SeedsRow]:
    """One row per network and eps: means over the seeds that have a ledger there, with 95 % t-intervals.

    A ledger that lacks images which others of its run have is left out; the run's ``missing`` says it.
    Raises InputError if the runs are not the same recipe with different seeds.
    """
    check_same_recipe(runs)
    found: dict[tuple[float, str], list[Row]] = {}
    for run in runs:
        for row in network_rows(run, lambda variant, run=run: filter(run.whole, variant.ledgers)):
            if eps is not None and not same_eps(row.eps, eps):
                continue
            found.setdefault((row.eps, row.variant), []).append(row)
    first = {row.variant: place for place, row in reversed(list(enumerate(r for rows in found.values() for r in rows)))}
    ordered = sorted(found.items(), key=lambda item: (item[0][0], first[item[0][1]]))
    return [_mean_row(rows) for _, rows in ordered]


def _mean_row(rows: list[Row]) -> SeedsRow:
    last = rows[-1]
    kept = [row.kept for row in rows if row.kept is not None]
    sparse = [row.sparsity for row in rows if row.sparsity is not None]
    trained = [row.training_seconds for row in rows if row.training_seconds is not None]
    return SeedsRow(
        variant=last.variant,
        label=last.label,
        sparsity=fmean(sparse) if sparse else None,
        kept=fmean(kept) if kept else None,
        eps=last.eps,
        norm=last.norm,
        seeds=len(rows),
        n=min(row.n for row in rows),
        clean=mean_rate([row.clean.value for row in rows]),
        attack=mean_rate([row.attack.value for row in rows]),
        certified=mean_rate([row.certified.value for row in rows]),
        each_certified=tuple(row.certified.value for row in rows),
        training_seconds=fmean(trained) if trained else None,
        certification_seconds=fmean(row.certification_seconds for row in rows),
    )
