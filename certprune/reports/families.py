"""Runs of several recipes side by side: what each objective gives, dense and pruned, averaged over seeds.

A family is the runs of one recipe that differ in the seed. Its figures are tables, one for each way in which its
networks were certified: against a threat set by bounds, or by randomized smoothing with one sigma. A cell that no
ledger fills is None, and stays so up to the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from statistics import fmean
from typing import Any

from certifiers.errors import InputError
from certifiers.verdict import Status
from certprune.reports.compare import BASELINES, alike, pairs_to_compare
from certprune.reports.ledgers import LedgerView
from certprune.reports.look import BUDGETS, NORMS, chosen_by, objective_label, percent
from certprune.reports.read import RunView, Variant
from certprune.reports.rows import Rate, network, ordered
from certprune.reports.seeds import mean_rate, recipe_of
from certprune.reports.smoothed import accuracy_at, ledger_at, shown_radii


@dataclass(frozen=True)
class Measure:
    """One accuracy that a table has a column for; ``radius``: of a smoothing certificate, in pixels (ℓ2)."""

    key: str
    heading: str
    radius: float | None = None


BY_BOUNDS = (
    Measure("clean", "Clean %"),
    Measure("attack", "Attack %"),
    Measure("ibp", "IBP certified %"),
    Measure("certified", "Certified %"),
)


@dataclass(frozen=True)
class Source:
    """How figures were certified: by bounds at ``level`` = eps, or by smoothing with ``level`` = sigma."""

    kind: str  # "bounds" or "smoothing"
    level: float
    measures: tuple[Measure, ...]

    def __str__(self) -> str:
        return f"eps {self.level:g}" if self.kind == "bounds" else f"sigma {self.level:g}"


@dataclass(frozen=True)
class Cells:
    """One line of figures: means over the seeds that have them, with 95 % t-intervals; None where none has.

    ``n``: images behind each seed's figure, the fewest where they differ. ``each``: the seeds' own values.
    """

    rates: dict[str, Rate | None]
    each: dict[str, tuple[float, ...]]
    seeds: tuple[int | None, ...]
    n: int | None


@dataclass(frozen=True)
class NetworkRow:
    """One network of a family."""

    label: str
    variant: Variant  # as the first run of the family has it
    cells: Cells


@dataclass(frozen=True)
class GapRow:
    """A learned criterion minus a baseline that shares all but the criterion, paired over the seeds."""

    label: str  # "learned scores − least magnitude"
    first: Variant
    second: Variant
    cells: Cells


@dataclass(frozen=True)
class FamilyTable:
    """A family's networks by one source, in the order of reports: not pruned, then by rising sparsity."""

    source: Source
    images: str  # e.g. "fashion-mnist test"
    note: str  # what the certificates are of
    rows: list[NetworkRow]
    gaps: list[GapRow]

    @property
    def dense(self) -> NetworkRow | None:
        """The network that is not pruned, the yardstick of the others."""
        return next((row for row in self.rows if row.variant.criterion is None), None)

    def gap(self, sparsity: float, budget: str) -> GapRow | None:
        """Scores learned against the family's own objective minus magnitude, at this sparsity and budget.

        Both in one shot and without a pattern where that was done, else as the first pair there is.
        """
        wanted = ("score", None, sparsity, budget, "magnitude")
        found = [
            gap
            for gap in self.gaps
            for each in [gap.first]
            if (each.criterion, each.objective, each.sparsity, each.budget, gap.second.criterion) == wanted
        ]
        return min(found, key=lambda gap: gap.first.how != "", default=None)


@dataclass(frozen=True)
class Family:
    """The runs of one recipe. Times are means over the runs, in seconds, of what is on record."""

    title: str
    runs: list[RunView]
    tables: list[FamilyTable]
    epochs: tuple[int | None, int | None, int | None]  # pretrain, prune, finetune
    pretraining_seconds: float | None
    network_seconds: float | None  # one network after pretraining, the mean over them
    missing: list[str] = field(default_factory=list)

    @property
    def training_seconds(self) -> float | None:
        """All training of one run."""
        spent = [
            sum(stage.seconds for variant in run.variants for stage in variant.stages.values()) for run in self.runs
        ]
        return fmean(spent) if any(spent) else None


def families_of(runs: Sequence[RunView], eps: float | None = None) -> list[Family]:
    """The runs as families, in the order they came; ``eps`` for all of them (default: each recipe's own).

    Runs of a family need not hold the same networks, nor certify as many images: each row counts its own seeds. A
    ledger that lacks images which others of its run have is left out, and the family's ``missing`` says it.

    Raises InputError for no runs, and for a recipe that was given twice with one seed.
    """
    groups = grouped(runs)
    return [_family(name, members, eps) for name, members in zip(_titles(groups), groups, strict=True)]


def grouped(runs: Sequence[RunView], one: Callable[[RunView], Any] = attrgetter("seed")) -> list[list[RunView]]:
    """Runs that are akin together, in the order they came; no two of a group may have the same ``one``.

    Raises InputError for no runs, and for two such.
    """
    if not runs:
        raise InputError("No run was given. Give run folders of one or more recipes, e.g. runs/demo.")
    groups: list[list[RunView]] = []
    for run in runs:
        fitting = (members for members in groups if all(akin(run, member) for member in members))
        members = next(fitting, None)
        if members is None:
            groups.append([run])
            continue
        twice = next((member for member in members if one(member) == one(run)), None)
        if twice is not None:
            raise InputError(
                f"'{twice.folder}' and '{run.folder}' have the same seed {run.seed}: they are no independent runs. "
                "Leave out one."
            )
        members.append(run)
    return groups


def akin(run: RunView, other: RunView) -> bool:
    """Whether two runs are one recipe's but for the seed, and networks of one name are made alike in both."""
    one, two = recipe_of(run), recipe_of(other)
    ours, theirs = ({v["name"]: v for v in recipe.pop("variants", [])} for recipe in (one, two))
    for recipe in (one, two):
        recipe.get("certify", {}).pop("count", None)
    return one == two and all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def _family(title: str, runs: list[RunView], eps: float | None) -> Family:
    stages = [runs[0].config.get(stage) or {} for stage in ("pretrain", "prune", "finetune")]
    pretrain = [run.pretrain.seconds for run in runs if run.pretrain and run.pretrain.complete]
    after = [
        variant.seconds
        for run in runs
        for variant in run.variants
        if "finetune" in variant.stages and variant.stages["finetune"].complete
    ]
    return Family(
        title=title,
        runs=runs,
        tables=[_table(runs, source) for source in _sources(runs, eps)],
        epochs=tuple(stage.get("epochs") for stage in stages),
        pretraining_seconds=fmean(pretrain) if pretrain else None,
        network_seconds=fmean(after) if after else None,
        missing=[f"seed {run.seed}: {line}" for run in runs for line in (*run.alarms, *run.missing)],
    )


def _titles(groups: list[list[RunView]]) -> list[str]:
    """A heading for each family: its objective, then what sets it apart from others of that objective."""
    short = [_objective_title(members[0]) for members in groups]
    named = [
        text if short.count(text) == 1 else f"{text} ({members[0].name})"
        for text, members in zip(short, groups, strict=True)
    ]
    return [
        text if named.count(text) == 1 else f"{text}, seeds {', '.join(str(run.seed) for run in members)}"
        for text, members in zip(named, groups, strict=True)
    ]


def _objective_title(run: RunView) -> str:
    objective = run.config.get("objective") or {}
    name = objective_label(str(objective.get("name", run.name)))
    sizes = [f"{key} {objective[key]:g}" for key in ("eps", "sigma") if isinstance(objective.get(key), (int, float))]
    return ", ".join([name[0].upper() + name[1:], *sizes])


def _sources(runs: list[RunView], eps: float | None) -> list[Source]:
    """Bounds at one eps if any network has a ledger there, then each sigma that any network was smoothed with."""
    wanted = next((run.main_eps for run in runs if run.main_eps is not None), None) if eps is None else eps
    held = wanted is not None and any(variant.ledger(wanted) for run in runs for variant in run.variants)
    radii = tuple(Measure(f"r={radius:g}", f"r = {radius:g} %", radius) for radius in shown_radii(runs[0].config))
    sigmas = sorted(
        {ledger.sigma for run in runs for variant in run.variants for ledger in variant.smoothed if ledger.usual}
    )
    return [Source("bounds", wanted, BY_BOUNDS)] * held + [Source("smoothing", sigma, radii) for sigma in sigmas]


def _table(runs: list[RunView], source: Source) -> FamilyTable:
    fullest = max(runs, key=lambda run: len(run.variants))
    networks = [(variant, label) for variant, label in ordered(fullest).values() if variant.name != "pretrain"]
    found = {
        variant.name: {run.seed: _whole(run, run.variant(variant.name), source) for run in runs}
        for variant, _ in networks
    }
    ledgers = [ledger for run in runs for variant in run.variants if (ledger := _ledger(variant, source)) is not None]
    gaps = [
        GapRow(_difference(first, second), first, second, _paired(found[first.name], found[second.name], source))
        for first, second in pairs_to_compare(fullest)
        if second.criterion in BASELINES
    ]
    return FamilyTable(
        source=source,
        images=" and ".join(dict.fromkeys(ledger.images for ledger in ledgers)),
        note=_note(ledgers, source),
        rows=[NetworkRow(label, variant, _averaged(found[variant.name], source)) for variant, label in networks],
        gaps=sorted(gaps, key=lambda gap: (gap.first.sparsity or 0.0, gap.first.budget or "")),
    )


def _ledger(variant: Variant | None, source: Source) -> Any:
    if variant is None:
        return None
    if source.kind == "bounds":
        return variant.ledger(source.level)
    return ledger_at(variant.smoothed, source.level)


def _whole(run: RunView, variant: Variant | None, source: Source) -> Any:
    """A network's ledger, if it has the images that others of its run have; else None."""
    ledger = _ledger(variant, source)
    return ledger if ledger is not None and run.whole(ledger) else None


def _figures(ledger: Any, source: Source) -> dict[str, float]:
    """The accuracies of one network of one run and, under ``n``, over how many images."""
    if source.kind == "bounds":
        summary = ledger.summary
        figures = {name: getattr(summary, name).value for name in ("clean", "attack", "certified")}
        return figures | by_ibp(ledger) | {"n": summary.n}
    figures = {m.key: accuracy_at(ledger, m.radius).value for m in source.measures}
    return figures | {"n": len(ledger.verdicts)}


def by_ibp(ledger: LedgerView) -> dict[str, float]:
    """The share that interval bounds alone certify; known only where they came first, and so saw every image."""
    if ledger.method.split("+")[0] != "ibp":
        return {}
    proven = sum(v.status is Status.certified and v.method == "ibp" for v in ledger.verdicts)
    return {"ibp": proven / len(ledger.verdicts)}


def _averaged(ledgers: dict[int | None, Any], source: Source) -> Cells:
    held = {seed: _figures(ledger, source) for seed, ledger in ledgers.items() if ledger is not None}
    return _means(held, source)


def _means(held: dict[int | None, dict[str, float]], source: Source, bounded: bool = True) -> Cells:
    each = {
        measure.key: tuple(figures[measure.key] for figures in held.values() if measure.key in figures)
        for measure in source.measures
    }
    rates = {key: mean_rate(values, bounded) if values else None for key, values in each.items()}
    return Cells(rates, each, tuple(held), min((int(figures["n"]) for figures in held.values()), default=None))


def _paired(first: dict, second: dict, source: Source) -> Cells:
    """Differences of the seeds that have both networks, over the images that both were certified on."""
    gaps: dict[int | None, dict[str, float]] = {}
    for seed, ledgers in ((seed, (first[seed], second[seed])) for seed in first):
        if None not in ledgers and alike(*ledgers):
            shared = frozenset.intersection(*(ledger.indices for ledger in ledgers))
            one, other = (_figures(_over(ledger, shared), source) for ledger in ledgers)
            gaps[seed] = {key: one[key] - other[key] for key in one.keys() & other.keys() - {"n"}} | {"n": one["n"]}
    return _means(gaps, source, bounded=False)


def _over(ledger: Any, images: frozenset[int]) -> Any:
    """The ledger's part about these images."""
    if ledger.indices == images:
        return ledger
    return replace(ledger, verdicts=[verdict for verdict in ledger.verdicts if verdict.index in images])


def _difference(first: Variant, second: Variant) -> str:
    return " \N{MINUS SIGN} ".join(chosen_by(replace(network(each), budget=None)) for each in (first, second))


def budget_label(variant: Variant) -> str:
    return BUDGETS.get(variant.budget, variant.budget or "")


def sparsity_label(variant: Variant) -> str:
    return "" if variant.sparsity is None else percent(variant.sparsity, 2)


def _note(ledgers: list[Any], source: Source) -> str:
    """By which methods, against what; as the ledgers' headers say."""
    if not ledgers:
        return ""
    header = ledgers[0].header
    if source.kind == "bounds":
        norm = NORMS.get(ledgers[0].norm, ledgers[0].norm)
        steps = f"PGD of {header['attack_steps']} steps" if "attack_steps" in header else "the ledgers' attack"
        return f"{norm} eps {source.level:g}; attacked by {steps}, certified by {ledgers[0].method}"
    counts = ", ".join(f"{key} {header[key]:,}" for key in ("n0", "n") if key in header)
    norm = NORMS[ledgers[0].norm]
    return (
        f"{norm} radii by randomized smoothing with sigma {source.level:g} ({counts}, alpha {header.get('alpha', '?')})"
    )
