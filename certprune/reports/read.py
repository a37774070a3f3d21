"""What a run folder holds, as plain frozen values.

Nothing here loads weights, runs a model or needs the recipe's schema: an unfinished, old or partly copied run can
still be read, and what it lacks is said in :attr:`RunView.missing` instead of raised.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from certifiers.errors import InputError
from certprune.reports.asked import asked_count, asked_images, needed_images
from certprune.reports.ledgers import LedgerView, RadiusView, main_ledgers, read_ledgers, same_eps
from certprune.reports.smoothed import SmoothedView, ledger_at, missing_smoothing, read_smoothed, smoothing_settings
from certprune.variant_names import default_name, unusual

STAGES = ("prune", "finetune")
METHODS = ("ibp", "crown-ibp", "crown")  # what a recipe that names none certifies by


@dataclass(frozen=True)
class Stage:
    """One training stage. ``complete`` says whether its ``stage.json`` was written, which happens last."""

    name: str
    complete: bool
    epochs: int  # planned if complete, else how many are on record
    selected_epoch: int | None
    seconds: float  # training time so far
    sparsity: dict | None  # {"total", "kept", "weights", "layers": [{"name", "weights", "kept"}]}
    metrics: list[dict] = field(repr=False)  # one entry an epoch, see metrics.jsonl
    objective: str | None = None  # the name of what it minimised, where that is on record


@dataclass(frozen=True)
class Variant:
    """One network of a run: the pretrained one, the dense baseline, or a pruned one."""

    name: str
    criterion: str | None  # None: not pruned
    budget: str | None
    sparsity: float | None  # what the recipe asks for; measured figures are in the stages
    stages: dict[str, Stage]
    ledgers: list[LedgerView]  # by the recipe's methods without a time limit, ascending eps, one for each
    others: list[LedgerView] = field(default_factory=list)  # by other methods, verifiers or under a time limit
    objective: str | None = None  # its own objective, if it has one that the recipe does not share: name or settings
    smoothed: list[SmoothedView] = field(default_factory=list)  # by randomized smoothing, ascending sigma
    radii: list[RadiusView] = field(default_factory=list)  # the largest certified eps of each image
    how: str = ""  # schedule, pattern and floor in words, where they are not the usual ones

    @property
    def size(self) -> dict | None:
        """The sparsity record of the last complete stage, or None."""
        done = [stage.sparsity for stage in self.stages.values() if stage.complete and stage.sparsity]
        return done[-1] if done else None

    @property
    def seconds(self) -> float | None:
        """Training time of this variant's own stages, or None where nothing is on record."""
        return sum(stage.seconds for stage in self.stages.values()) if self.stages else None

    def ledger(self, eps: float) -> LedgerView | None:
        """The ledger at ``eps`` by the recipe's methods: what networks are compared by, since all are put to these.

        What all ledgers prove together is ``together.ledger_together``.
        """
        return next((ledger for ledger in self.ledgers if same_eps(ledger.eps, eps)), None)


@dataclass(frozen=True)
class RunView:
    """A run folder. ``missing`` lists, in sentences, what is not there yet or cannot be read.

    ``alarms`` are contradicted certificates; such a ledger is not counted, and every report says so first.
    """

    folder: Path
    name: str
    config: dict
    provenance: dict
    variants: list[Variant]
    missing: list[str]
    alarms: list[str]

    @property
    def seed(self) -> int | None:
        return self.config.get("seed", self.provenance.get("seed"))

    @property
    def pretrain(self) -> Stage | None:
        found = self.variant("pretrain")
        return found.stages.get("pretrain") if found else None

    def variant(self, name: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == name), None)

    def whole(self, ledger: LedgerView | SmoothedView) -> bool:
        """Whether a ledger may be averaged and compared with others of this run: none has more of what was asked for.

        Others are those of the networks after pretraining, at the same eps or sigma.
        """
        networks = [variant for variant in self.variants if variant.name != "pretrain"]
        if isinstance(ledger, LedgerView):
            others, count = [variant.ledger(ledger.eps) for variant in networks], asked_count(self.config)
        else:
            others = [ledger_at(variant.smoothed, ledger.sigma) for variant in networks]
            count = asked_count(self.config, smoothing_settings(self.config))
        return needed_images(count, [other.indices for other in others if other is not None]) <= ledger.indices

    @property
    def eps_grid(self) -> list[float]:
        """Every eps at which a ledger exists, ascending."""
        return sorted({ledger.eps for variant in self.variants for ledger in variant.ledgers})

    @property
    def main_eps(self) -> float | None:
        """The eps the networks were trained for where it was certified, else the one certified most widely."""
        grid = self.eps_grid
        trained = self.config.get("objective", {}).get("eps")
        if trained is not None:
            for eps in grid:
                if same_eps(eps, float(trained)):
                    return eps
        held = {eps: sum(variant.ledger(eps) is not None for variant in self.variants) for eps in grid}
        return max(grid, key=lambda eps: (held[eps], eps)) if grid else None


def read_run(folder: str | Path) -> RunView:
    """Read a run folder. Raises InputError if the folder is no run (it has no readable ``config.yaml``)."""
    folder = Path(folder)
    config = _read_config(folder)
    missing: list[str] = []
    alarms: list[str] = []
    provenance = _read_json(folder / "provenance.json", missing)
    methods = "+".join((config.get("certify") or {}).get("methods") or METHODS)
    variants = [_read_variant(folder, plan, methods, missing, alarms) for plan in _plans(folder, config)]
    missing += _missing_verdicts(variants, config)
    missing += missing_smoothing(variants, config)
    name = str(config.get("name", folder.resolve().name))
    return RunView(folder, name, config, provenance, variants, missing, alarms)


def variant_name(plan: dict) -> str:
    """The folder name of a variant as the recipe states it: its ``name``, or what the recipe's schema makes of it."""
    return str(plan.get("name") or default_name(plan))


def _objective(plan: dict) -> str | None:
    """An own objective: its name, or of the recipe's with other settings these, as "eps 0.15, kappa.end 1"."""
    own = plan.get("objective")
    if not isinstance(own, dict) or not own:
        return None
    return str(own["name"]) if own.get("name") else ", ".join(_settings(own))


def _settings(values: dict, above: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        name = f"{above}{key}"
        found += _settings(value, f"{name}.") if isinstance(value, dict) else [f"{name} {value}"]
    return found


def _read_config(folder: Path) -> dict:
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"'{folder}' is not a run folder: it has no config.yaml. Give the folder that `certprune run` wrote, "
            "e.g. runs/demo."
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not readable as YAML ({error}). Restore it from the recipe.") from error
    if not isinstance(config, dict):
        raise InputError(f"'{path}' should hold a recipe (keys and values) but holds {type(config).__name__}.")
    return config


def _read_json(path: Path, missing: list[str]) -> dict:
    if not path.is_file():
        missing.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        missing.append(f"{path.parent.name}/{path.name} is not readable as JSON.")
        return {}
    return value


def _plans(folder: Path, config: dict) -> list[dict]:
    """The pretrained network, the recipe's variants in its order, then whatever else the folder holds."""
    plans = [{"name": "pretrain"}]
    plans += [plan for plan in config.get("variants") or [] if isinstance(plan, dict)]
    known = {variant_name(plan) for plan in plans}
    found = {path.parent.name for path in folder.glob("certificates/*/*.jsonl")}
    found |= {path.parent.parent.name for stage in STAGES for path in folder.glob(f"*/{stage}/stage.json")}
    return plans + [{"name": name} for name in sorted(found - known)]


def _read_variant(folder: Path, plan: dict, methods: str, missing: list[str], alarms: list[str]) -> Variant:
    name = variant_name(plan)
    if name == "pretrain":
        stages = {"pretrain": _read_stage(folder / "pretrain", "pretrain", missing)}
    else:
        stages = {stage: _read_stage(folder / name / stage, f"{name}/{stage}", missing) for stage in STAGES}
    stages = {key: stage for key, stage in stages.items() if stage is not None}
    if not stages or not list(stages.values())[-1].complete or (name != "pretrain" and "finetune" not in stages):
        missing.append(_unfinished(name, stages))
    certificates = folder / "certificates" / name
    found, radii = read_ledgers(certificates, missing, alarms)
    smoothed = read_smoothed(certificates, missing, alarms)
    held = (stages, *main_ledgers(found, methods, missing), _objective(plan), smoothed, radii)
    if plan.get("dense") or name == "pretrain":
        return Variant(name, None, None, 0.0, *held)
    sparsity = plan.get("sparsity", found[0].header.get("sparsity") if found else None)
    return Variant(name, plan.get("criterion"), plan.get("budget"), sparsity, *held, how=", ".join(unusual(plan)))


def _unfinished(name: str, stages: dict[str, Stage]) -> str:
    if not stages:
        return f"{name}: training has not begun."
    stage, record = list(stages.items())[-1]
    if record.complete:
        return f"{name}: {stage} is done, the next stage has not begun."
    what = "training" if name == "pretrain" else stage
    return f"{name}: {what} is not finished ({record.epochs} epochs on record)."


def _read_stage(folder: Path, label: str, missing: list[str]) -> Stage | None:
    if not folder.is_dir():
        return None
    metrics = _read_metrics(folder / "metrics.jsonl", label, missing)
    complete = (folder / "stage.json").is_file()
    record = _read_json(folder / "stage.json", missing) if complete else {}
    selected = [entry.get("epoch") for entry in metrics if entry.get("selected")]
    return Stage(
        name=folder.name,
        complete=complete,
        epochs=int(record.get("epochs", len(metrics))),
        selected_epoch=record.get("selected_epoch", selected[-1] if selected else None),
        seconds=float(record.get("seconds") or sum(entry.get("seconds", 0.0) for entry in metrics)),
        sparsity=record.get("sparsity"),
        metrics=metrics,
        objective=_objective(record),
    )


def _read_metrics(path: Path, label: str, missing: list[str]) -> list[dict]:
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            missing.append(f"{label}: metrics.jsonl holds a line that is not JSON; it is left out.")
            continue
        entries.append(entry)
    return entries


def _planned_eps(config: dict) -> list[float]:
    listed = (config.get("certify") or {}).get("eps")
    trained = config.get("objective", {}).get("eps")
    return [float(eps) for eps in (listed or ([] if trained is None else [trained]))]


def _missing_verdicts(variants: list[Variant], config: dict) -> list[str]:
    """Ledgers the recipe asks for that are absent, and ledgers that lack images it asks for."""
    missing, planned = [], _planned_eps(config)
    held = [ledger.indices for variant in variants for ledger in variant.ledgers]
    asked = asked_images(asked_count(config), held)
    for variant in variants:
        trained = variant.stages.get("finetune")
        # Pretrained networks are certified only on request; that training is missing is said already.
        due = planned if trained and trained.complete else []
        lacking = [f"{eps:g}" for eps in due if variant.ledger(eps) is None]
        if lacking:
            missing.append(f"{variant.name}: not certified yet at eps {', '.join(lacking)}.")
        for ledger in variant.ledgers:
            done = len(asked & ledger.indices)
            if done < len(asked):
                missing.append(
                    f"{variant.name}: at eps {ledger.eps:g} only {done:,} of {len(asked):,} images are decided."
                )
    return missing
