"""Which of the pretrained weights learned scores keep, and which least magnitude does: the picture of HYDRA's paper.

Magnitude keeps the two tails by its definition. Scores that are learned on a loss may keep small weights too, and drop
large ones (Sehwag et al. 2020, arXiv 2002.10509, figure 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from certifiers.errors import InputError
from certprune.reports.look import BUDGETS, CRITERIA, LIGHT, percent
from certprune.reports.plot import INK, dress
from certprune.reports.study_charts import SLOTS, new_figure, png
from certprune.reports.study_rows import Section, StudyRow, Trained
from certprune.storage import read_tensors

BINS, COLUMNS, PREFERRED = 41, 3, 0.99
SHOWN = ("score", "joint")  # learned criteria that are held against magnitude, in the order they are drawn


@dataclass(frozen=True)
class KeptWeights:
    """Of one run's pretrained network: the ``weights`` of each layer, and by criterion which of them are kept."""

    sparsity: float
    budget: str
    seed: int | None
    weights: dict[str, numpy.ndarray]
    masks: dict[str, dict[str, numpy.ndarray]]

    def overlap(self, criterion: str) -> float:
        """The share of the weights that ``criterion`` keeps which least magnitude keeps too."""
        both = [self.masks[criterion][name] & self.masks["magnitude"][name] for name in self.weights]
        kept = sum(int(mask.sum()) for mask in self.masks[criterion].values())
        return sum(int(mask.sum()) for mask in both) / max(kept, 1)

    def typical(self, criterion: str) -> float:
        """The median magnitude of the weights that ``criterion`` keeps, in standard deviations of their layer."""
        sizes = [
            abs(values[self.masks[criterion][name]]) / max(float(values.std()), 1e-12)
            for name, values in self.weights.items()
        ]
        return float(numpy.median(numpy.concatenate(sizes)))


def kept_weights(section: Section) -> KeptWeights | None:
    """Of the first seed that has masks of learned scores and of magnitude at one sparsity under one budget.

    At 99 % where it can be, else at the highest sparsity; None where no run has both, or its weights are not there.
    """
    levels = sorted(section.groups, key=lambda level: (level != PREFERRED, -level))
    for level in levels:
        rows = [row for row in section.groups[level] if row.pruned and not row.elsewhere]
        for budget in dict.fromkeys(["erk", "uniform", *(str(row.network.budget) for row in rows)]):
            found = {name: _of(rows, name, budget) for name in ("magnitude", *SHOWN)}
            score, magnitude = found["score"], found["magnitude"]
            if score is None or magnitude is None:
                continue
            for seed in (seed for seed in score.nets if seed in magnitude.nets):
                own = {name: row.nets[seed] for name, row in found.items() if row is not None and seed in row.nets}
                read = _read(level, budget, seed, own)
                if read is not None:
                    return read
    return None


def weights_chart(found: KeptWeights) -> bytes:
    """Histograms of the pretrained weights that are kept, layer by layer, on a logarithmic scale of their number."""
    names = list(found.weights)
    rows = -(-len(names) // COLUMNS) if len(names) > 4 else 1
    columns = min(len(names), COLUMNS) if len(names) > 4 else len(names)
    figure = new_figure(2.7 * columns + 0.6, 0.8 + 2.7 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, object] = {}
    for axes, name in zip(places, names, strict=False):
        values = found.weights[name]
        edge = float(abs(values).max()) or 1.0
        bins = numpy.linspace(-edge, edge, BINS + 1)
        *_, shape = axes.hist(values, bins, color="#d7dbe1", label="all pretrained weights")
        handles["all pretrained weights"] = shape[0]
        for criterion in found.masks:
            kept = values[found.masks[criterion][name]]
            look = {"color": LIGHT[SLOTS[criterion]], "linewidth": 1.5}
            *_, shape = axes.hist(kept, bins, histtype="step", **look)
            handles[f"kept by {CRITERIA[criterion]}"] = shape[0]
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.minorticks_off()
        axes.set_title(name, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("value after pretraining", fontsize=9, color=INK)
        dress(axes)
    for axes in places[len(names) :]:
        axes.set_axis_off()
    where = {"loc": "outside lower left", "ncols": len(handles), "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(list(handles.values()), list(handles), **where)
    figure.supylabel("weights (logarithmic)", fontsize=9, color=INK)
    return png(figure)


def told(found: KeptWeights) -> str:
    """What the histograms show, in figures."""
    parts = []
    for criterion in (name for name in SHOWN if name in found.masks):
        parts.append(
            f"of the weights that {CRITERIA[criterion]} keep, magnitude keeps {100 * found.overlap(criterion):.0f} %; "
            f"their median magnitude is {found.typical(criterion):.2f} standard deviations of their layer"
        )
    budget = BUDGETS.get(found.budget, found.budget)
    return (
        f"At {percent(found.sparsity, 2)}, {budget} budget, seed {found.seed}: {'; '.join(parts)}; the median "
        f"of those that magnitude keeps is {found.typical('magnitude'):.2f}."
    )


def _of(rows: list[StudyRow], criterion: str, budget: str) -> StudyRow | None:
    """Scores and magnitude in one shot, so that both choose among the pretrained weights; joint in any schedule."""
    for row in rows:
        each = row.network
        alike = (each.criterion, each.budget, each.objective) == (criterion, budget, None)
        if alike and (not each.how or criterion == "joint"):
            return row
    return None


def _read(level: float, budget: str, seed: int | None, own: dict[str, Trained]) -> KeptWeights | None:
    """None where a file of a run is missing or damaged: the page then goes without this picture."""
    run = own["score"].run.folder
    try:
        masks = {name: _masks(net.run.folder / net.variant.name) for name, net in own.items()}
        tensors = read_tensors(run / "pretrain" / "model.safetensors")
    except InputError:
        return None
    layers = [layer["name"] for layer in (own["score"].variant.size or {}).get("layers", ())]  # from input to output
    held = {name: tensors.get(f"{name}.weight") for name in layers if all(name in mask for mask in masks.values())}
    weights = {name: tensor.float().numpy().ravel() for name, tensor in held.items() if tensor is not None}
    chosen = {kind: {name: held[name] for name in weights} for kind, held in masks.items()}
    return KeptWeights(level, budget, seed, weights, chosen) if weights else None


def _masks(folder: Path) -> dict[str, numpy.ndarray]:
    """By layer, flat; as pruning left them."""
    tensors = read_tensors(folder / "prune" / "masks.safetensors")
    return {name.removesuffix(".weight"): mask.bool().numpy().ravel() for name, mask in tensors.items()}
