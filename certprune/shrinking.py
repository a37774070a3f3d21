"""The smallest network of a run that keeps a guarantee: a search over sparsity on the validation split.

Each try prunes the run's pretrained network by the recipe and finetunes it, as a variant of the run like any other, and
certifies it on validation images. So everything can be cut off anywhere and goes on, and what the run holds already
counts. The test split is certified once, for the network that is chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from certifiers.errors import InputError
from certifiers.verdict import Summary, read_ledger, summarise
from certprune.certifying import certify_network
from certprune.compact import Cost, compact, cost_of, write_compacted
from certprune.config import RESERVED, Recipe, VariantSettings
from certprune.progress import Progress
from certprune.provenance import command_line
from certprune.runs import Run, start_run
from certprune.shrink_report import WITHIN
from certprune.stages import check_network, run_stages
from certprune.subjects import Subject, subject
from certprune.variant_names import default_name

FIRST = 0.01  # the fraction of weights to begin with, where the run says nothing
STEP = 4.0  # by which the search goes on while all tries hold, or none does
MOST, LEAST = 0.5, 1e-4


@dataclass(frozen=True)
class Try:
    """One network that was tried; ``found`` is None where no network can be made that small (``note`` says why)."""

    variant: str
    kept: float  # the fraction of weights asked for
    weights: int
    found: Summary | None
    note: str = ""

    def holds(self, target: float) -> bool:
        return self.found is not None and self.found.certified.value >= target


@dataclass(frozen=True)
class Shrunk:
    """What was asked, what was tried (most weights first), and the smallest that holds with its test result, if any."""

    target: float
    eps: float
    tries: list[Try]
    chosen: Try | None = None
    network: Path | None = None
    test: Summary | None = None
    cost: Cost | None = None
    dense: Cost | None = None


def next_kept(holding: Sequence[float], failing: Sequence[float], within: float) -> float | None:
    """The fraction of weights to try next; None once the smallest that holds is within the factor ``within`` of one
    that does not, or where the search comes to an end of its range.

    Halves the bracket on a logarithmic scale. Failures above the smallest that holds say nothing.
    """
    if not holding:
        largest = max(failing, default=FIRST / STEP)
        return _rounded(min(STEP * largest, MOST)) if largest < MOST else None
    smallest = min(holding)
    below = [kept for kept in failing if kept < smallest]
    if not below:
        return _rounded(max(smallest / STEP, LEAST)) if smallest > LEAST else None
    if smallest / max(below) <= within:
        return None
    guess = _rounded(math.sqrt(smallest * max(below)))
    return guess if max(below) < guess < smallest else None


def _rounded(kept: float) -> float:
    return float(f"{kept:.2g}")


@dataclass
class Search:
    """The search for one target; ``run`` gets a variant with every network that is tried.

    ``count``: so many images of the validation split, from the first.
    """

    run: Run
    data: Any
    device: torch.device
    eps: float
    count: int | None = None
    progress: Progress = field(default_factory=Progress)

    def shrink(self, target: float, like: str | None = None, within: float = WITHIN) -> Shrunk:
        """Find the network with the fewest weights whose certified accuracy is at least ``target``.

        Certified accuracy is that on validation images by the recipe's methods. Networks differ from the variant
        ``like`` (default: the recipe's first pruned one) in their sparsity alone. The chosen one is compacted, to
        ``compacted.safetensors`` in its folder, and what is certified on the test split is that network.

        Raises InputError for a target outside (0, 1), a run without its pretrained network, and a variant whose
        sparsity cannot be varied.
        """
        template = template_of(self.run, like)
        _check(template, target, within)
        self.run.stage_record("pretrain")
        tried = {
            _kept(variant): self._measured(variant)
            for variant in self.run.recipe.variants
            if _alike(variant, template) and self.run.is_complete("finetune", variant.name)
        }
        while True:
            holding = [kept for kept, one in tried.items() if one.holds(target)]
            kept = next_kept(holding, [kept for kept in tried if kept not in holding], within)
            if kept is None:
                break
            tried[kept] = self._made(_resized(self.run.recipe, template, kept))
        tries = [tried[kept] for kept in sorted(tried, reverse=True)]
        found = Shrunk(target, self.eps, tries, tried[min(holding)] if holding else None)
        return found if found.chosen is None else self._tested(found)

    def _made(self, variant: VariantSettings) -> Try:
        """Train the variant, as one of the run, and measure it."""
        alone = self.run.recipe.model_copy(update={"variants": (variant,)})
        try:
            check_network(alone, self.data)
        except InputError as error:  # a budget that cannot be met
            return Try(variant.name, _kept(variant), 0, None, str(error))
        if self.run.recipe.variant(variant.name) is None:
            more = {"variants": (*self.run.recipe.variants, variant), "output": str(self.run.folder)}
            recipe = self.run.recipe.model_copy(update=more)
            self.run = start_run(recipe, command_line(), torch.get_num_threads(), str(self.device))
        run_stages(Run(self.run.folder, alone), self.data, self.device, ("prune", "finetune"), self.progress)
        return self._measured(variant)

    def _measured(self, variant: VariantSettings) -> Try:
        about = subject(self.run, variant.name)
        about = replace(about, ledgers=about.ledgers / "validation")
        found = self._certified(about, "validation", self.count)
        kept = self.run.stage_record("finetune", variant.name)["sparsity"]["kept"]
        return Try(variant.name, _kept(variant), kept, found)

    def _certified(self, network: Subject | Path, split: str, count: int | None) -> Summary:
        settings = self.run.recipe.certify.model_copy(update={"split": split, "count": count})
        there = Run(self.run.folder, self.run.recipe.model_copy(update={"certify": settings}))
        path = certify_network(there, network, self.eps, self.data, self.device, progress=self.progress)
        wanted = min(count or math.inf, len(getattr(self.data, split).y))
        return summarise([verdict for verdict in read_ledger(path)[1] if verdict.index < wanted])

    def _tested(self, found: Shrunk) -> Shrunk:
        """With the chosen network compacted, and certified on the test split."""
        about, shape = subject(self.run, found.chosen.variant), tuple(self.data.shape)
        origin = {"run": self.run.recipe.name, "variant": about.name, "sparsity": about.sparsity}
        small = replace(compact(about.model, shape), origin=origin)
        path = self.run.folder / about.name / "compacted.safetensors"
        write_compacted(small, path)
        test = self._certified(path, "test", self.run.recipe.certify.count)
        dense = cost_of(self.run.load_model("pretrain"), shape)
        return replace(found, network=path, test=test, cost=cost_of(small.model, shape), dense=dense)


def template_of(run: Run, like: str | None = None) -> VariantSettings:
    """The variant that tries are made like; InputError if the run has no pruned one called ``like``."""
    pruned = [variant for variant in run.recipe.variants if not variant.dense]
    if like is None and not pruned:
        return VariantSettings()
    found = pruned[0] if like is None else run.recipe.variant(like)
    if found is None or found.dense:
        known = ", ".join(variant.name for variant in pruned) or "none"
        raise InputError(
            f"Networks are made like a pruned variant of the run {run.folder}, but {like!r} is none. It has: {known}."
        )
    return found


def _check(template: VariantSettings, target: float, within: float) -> None:
    if not 0 < target < 1:
        raise InputError(f"The certified accuracy to keep must lie between 0 and 1, e.g. 0.65, but {target:g} came.")
    if not 1 < within < math.inf:
        raise InputError(f"The search ends within a factor above 1, e.g. 1.2, but {within:g} came.")
    if ":" in template.pattern:
        raise InputError(
            f"The variant {template.name} keeps {template.pattern} of its weights, which fixes its sparsity, so there "
            "is nothing to search. Give another variant of the run."
        )


def _alike(variant: VariantSettings, template: VariantSettings) -> bool:
    """Whether two variants differ in nothing but their sparsity and name."""
    same = {"sparsity": template.sparsity, "name": template.name}
    return not variant.dense and variant.model_copy(update=same) == template


def _kept(variant: VariantSettings) -> float:
    return round(1 - variant.sparsity, 10)


def _resized(recipe: Recipe, template: VariantSettings, kept: float) -> VariantSettings:
    """The template at another sparsity: the recipe's variant of these settings, else a new one.

    A default name leaves out what an objective of its own changes. So a variant that was named because of one, and one
    whose default name another has, lends its name, with the sparsity behind. A search that was cut off finds its own
    variant in the recipe.
    """
    content = template.model_dump(exclude={"name", "dense", "sparsity"})
    new = VariantSettings(**content, sparsity=round(1 - kept, 10))
    for variant in recipe.variants:
        if _alike(variant, template) and _kept(variant) == _kept(new):
            return variant
    own = f"{template.name}-{new.sparsity:g}"
    usual = default_name(template.model_dump())
    told = template.name == usual or "name" in (template.objective or {"name": ""})
    first = (new.name, own) if told else (own, new.name)
    names = itertools.chain(first, (f"{own}-{number}" for number in itertools.count(2)))
    free = next(name for name in names if name not in RESERVED and recipe.variant(name) is None)
    return new.model_copy(update={"name": free})
