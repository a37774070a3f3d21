"""What a study compares: networks of one or more recipes, each over its seeds, sorted by architecture and sparsity.

A section is one architecture on one data set: its dense network, what was pruned out of it by any recipe, and smaller
dense networks that were trained with as few weights from the start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import fmean
from typing import Any, ClassVar

from certprune.reports.compare import BASELINES
from certprune.reports.families import by_ibp, grouped
from certprune.reports.ledgers import LedgerView
from certprune.reports.look import Network, chosen_by, order, percent
from certprune.reports.read import RunView, Stage, Variant
from certprune.reports.rows import Column, Rate, network, points
from certprune.reports.seeds import mean_rate

NEAR = 1.3  # a dense network stands beside pruned ones with as many weights, give or take this factor
ACCURACIES = ("clean", "attack", "ibp", "certified", "validation_clean", "validation_certified")
FIXED = ("magnitude", "random")  # criteria that look at weights alone, so that pretraining decides, not a loss


@dataclass(frozen=True)
class Trained:
    """One network of one run. ``figures``: accuracies as fractions, counts, times in seconds; only what is known."""

    run: RunView
    variant: Variant
    ledger: LedgerView
    figures: dict[str, float]


@dataclass(frozen=True)
class StudyRow:
    """One network over its seeds; ``nets`` holds the seeds that have it certified on all the images of their run."""

    label: str
    network: Network
    nets: dict[int | None, Trained]
    recipe: int = 0  # whose network it is: the recipes of a section are numbered
    elsewhere: bool = False  # pruned against another objective than it was finetuned for
    small: bool = False  # dense, with fewer weights from the start

    short: ClassVar[tuple[Column, ...]] = (  # for a terminal
        Column("Sparsity", lambda row: percent(row.network.sparsity or 0.0, 2)),
        Column("Network", lambda row: row.label, left=True),
        Column("Clean %", lambda row: points(row.rate("clean"))),
        Column("Attack %", lambda row: points(row.rate("attack"))),
        Column("Certified %", lambda row: points(row.rate("certified"))),
        Column("Seeds", lambda row: str(len(row.nets))),
    )

    def each(self, key: str) -> list[float]:
        """The seeds' own values, of those that have it."""
        return [net.figures[key] for net in self.nets.values() if key in net.figures]

    def mean(self, key: str) -> float | None:
        values = self.each(key)
        return fmean(values) if values else None

    def rate(self, key: str) -> Rate | None:
        """Mean over the seeds with a 95 % t-interval, cut to [0, 1] where it is an accuracy."""
        values = self.each(key)
        return mean_rate(values, bounded=key in ACCURACIES) if values else None

    @property
    def pruned(self) -> bool:
        return self.network.criterion is not None

    @property
    def learned(self) -> bool:
        """Whether its mask was learned on the loss it is meant for."""
        return self.pruned and self.network.criterion not in BASELINES and not self.elsewhere

    @property
    def way(self) -> tuple:
        """What pruned networks of one way at several sparsities share."""
        each = self.network
        return (each.criterion, each.objective, each.budget, each.how, self.elsewhere, self.recipe)


@dataclass(frozen=True)
class Section:
    """One architecture: ``rows`` dense first, by rising sparsity; ``groups`` maps a sparsity to its rows."""

    model: str
    data: str
    seeds: tuple[int | None, ...]
    groups: dict[float, list[StudyRow]]
    runs: list[RunView]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.data}"

    @property
    def rows(self) -> list[StudyRow]:
        return [row for rows in self.groups.values() for row in rows]

    @property
    def dense(self) -> StudyRow | None:
        """The network of the first recipe that is not pruned, the yardstick of the others."""
        return next((row for row in self.groups.get(0.0, ()) if not row.small), None)

    def by_recipe(self) -> Iterator[tuple[float, list[StudyRow]]]:
        """Sparsities with the pruned networks of one recipe: what has the same pretraining and epochs."""
        for level, rows in self.groups.items():
            for recipe in dict.fromkeys(row.recipe for row in rows if row.pruned):
                yield level, [row for row in rows if row.pruned and row.recipe == recipe]


def sections_of(
    runs: Sequence[RunView], eps: float, unstable: Mapping[tuple[str, str], float] | None = None
) -> list[Section]:
    """The sections, in the order their first runs came; those without a certified network are left out.

    ``unstable``: the mean number of unstable units an image, by run folder and network, where it was counted.
    Raises InputError as :func:`recipes_of` does.
    """
    families: dict[str, list[list[RunView]]] = {}
    for members in recipes_of(runs):
        config = members[0].config
        key = json.dumps([config.get("model"), (config.get("data") or {}).get("name")], sort_keys=True, default=str)
        families.setdefault(key, []).append(members)
    found = [_section(groups, eps, unstable or {}) for groups in families.values()]
    found = [section for section in found if section.rows]
    whole = [section for section in found if any(row.pruned for row in section.rows)]
    if not whole:
        return found
    return [section for section in found if section in whole or not _stand_beside(section, whole)]


def recipes_of(runs: Sequence[RunView]) -> list[list[RunView]]:
    """Runs together that differ in the seed, in the networks they hold and in how many images they certify.

    Several runs of one seed are together where recipes of different names share all but their networks; a network that
    more than one of them holds is taken from the first. Raises InputError for no runs, and for one recipe twice with
    one seed.
    """
    return grouped(runs, one=attrgetter("seed", "name"))


def _section(groups: list[list[RunView]], eps: float, unstable: Mapping[tuple[str, str], float]) -> Section:
    rows: list[StudyRow] = []
    for number, members in enumerate(groups):
        found = [replace(row, recipe=number) for row in _rows(members, eps, unstable)]
        rows += _named_apart(found, rows, members[0])
    rows.sort(key=lambda row: order(row.network))  # stable: recipes stay in order
    levels = sorted({row.network.sparsity or 0.0 for row in rows})
    config, runs = groups[0][0].config, [run for members in groups for run in members]
    return Section(
        model=model_of(config.get("model")),
        data=str((config.get("data") or {}).get("name", "unnamed data")),
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        groups={level: [row for row in rows if (row.network.sparsity or 0.0) == level] for level in levels},
        runs=runs,
    )


def model_of(model: Any) -> str:
    """A recipe's model in words: "cnn_small (width 0.1)"."""
    if not isinstance(model, dict):
        return str(model or "an unnamed network")
    options = ", ".join(f"{key} {value}" for key, value in model.items() if key != "name")
    return str(model.get("name", "an unnamed network")) + (f" ({options})" if options else "")


def _rows(members: list[RunView], eps: float, unstable: Mapping[tuple[str, str], float]) -> list[StudyRow]:
    """The certified networks of one recipe; seeds need not hold the same ones."""
    known: dict[str, Variant] = {v.name: v for run in reversed(members) for v in run.variants if v.name != "pretrain"}
    rows = []
    for name, variant in known.items():
        found = [(run.seed, _trained(run, run.variant(name), eps, unstable)) for run in reversed(members)]
        nets = {seed: net for seed, net in found if net is not None}
        nets = {run.seed: nets[run.seed] for run in members if run.seed in nets}  # the first run's, in their order
        if not nets:
            continue
        first = next(iter(nets.values()))
        pruned_for, trained_for = objectives(first.run, first.variant)
        elsewhere = variant.criterion is not None and pruned_for != trained_for
        about = network(variant)
        about = replace(about, objective=about.objective or (pruned_for if elsewhere else None))
        rows.append(StudyRow(chosen_by(about, budgets=True), about, nets, elsewhere=elsewhere))
    return rows


def objectives(run: RunView, variant: Variant) -> tuple[str | None, str | None]:
    """The names of what a network's mask was found by and what it was finetuned for.

    The clean loss is ``benign``, by that name or as the whole share of an objective's loss (kappa 1). A criterion that
    looks at the weights alone, all at once, is of the loss that they were pretrained with.
    """
    shared = run.config.get("objective") or {}

    def of(stage: str) -> str | None:
        over = (run.config.get(stage) or {}).get("objective") or {}
        whole = {**shared, **over}
        clean = isinstance(whole.get("kappa"), dict) and whole["kappa"].get("end") == 1
        return "benign" if clean else whole.get("name")

    alone = variant.criterion in FIXED and not variant.how
    own = variant.objective
    return of("pretrain") if alone else (own or of("prune")), own or of("finetune")


def _trained(
    run: RunView, variant: Variant | None, eps: float, unstable: Mapping[tuple[str, str], float]
) -> Trained | None:
    """None where the network is not certified yet, or lacks images that others of its run are certified on."""
    ledger = None if variant is None else variant.ledger(eps)
    if variant is None or ledger is None or not run.whole(ledger):
        return None
    size, stages = variant.size or {}, [*((run.pretrain,) if run.pretrain else ()), *variant.stages.values()]
    figures: dict[str, Any] = {
        "sparsity_measured": size.get("total"),
        "kept": size.get("kept"),
        "weights": size.get("weights"),
        "images": len(ledger.verdicts),
        **{key: getattr(ledger.summary, key).value for key in ("clean", "attack", "certified")},
        **by_ibp(ledger),
        "unstable_units": unstable.get((str(run.folder), variant.name)),
        **_validation(variant.stages.get("finetune")),
        "epochs": sum(stage.epochs for stage in stages) if variant.stages else None,
        "training_seconds": variant.seconds,
        "pretraining_seconds": run.pretrain.seconds if run.pretrain else None,
        "certification_seconds": ledger.seconds,
    }
    return Trained(run, variant, ledger, {key: value for key, value in figures.items() if value is not None})


def _validation(stage: Stage | None) -> dict[str, float]:
    """Accuracies on the validation images in the epoch that was kept, by the bounds that it was trained with."""
    entries = stage.metrics if stage else ()
    kept = [entry.get("validation") or {} for entry in entries if entry.get("epoch") == stage.selected_epoch]
    names = ("clean_accuracy", "certified_accuracy")
    return {f"validation_{name.split('_')[0]}": kept[-1][name] for name in names if kept and name in kept[-1]}


def _named_apart(rows: list[StudyRow], others: list[StudyRow], run: RunView) -> list[StudyRow]:
    """The rows of a further recipe, with its name wherever an earlier recipe has a network of that description."""
    taken = {(row.label, row.network.sparsity) for row in others}
    for name in (run.name, run.folder.name):
        apart = [
            replace(row, label=f"{row.label} ({name})") if (row.label, row.network.sparsity) in taken else row
            for row in rows
        ]
        if not any((row.label, row.network.sparsity) in taken for row in apart):
            break
    return apart


def _stand_beside(section: Section, whole: list[Section]) -> bool:
    """Put dense networks beside pruned ones of the same data with as many weights; whether each found a place."""
    placed = 0
    for row in section.rows:
        kept = row.mean("kept")
        far = {
            (place, level): abs(math.log(kept / held))
            for place, other in enumerate(whole)
            for level, rows in other.groups.items()
            if kept and other.data == section.data and level and (held := _kept(rows))
        }
        nearest = min(far, key=far.get, default=None)
        if nearest is not None and far[nearest] <= math.log(NEAR):
            label = f"dense from the start, {section.model}"
            whole[nearest[0]].groups[nearest[1]].append(replace(row, label=label, small=True))
            placed += 1
    return placed == len(section.rows)


def _kept(rows: list[StudyRow]) -> float | None:
    values = [value for row in rows if row.pruned for value in row.each("kept")]
    return fmean(values) if values else None
