"""The figures of a study for other programs: a row for each network of each seed, and one for each test."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from certprune.reports.study_rows import Section, model_of
from certprune.reports.study_tests import Comparison

ABOUT = ("model", "data", "recipe", "run", "seed", "network", "label", "criterion", "budget", "how", "pruned_against")
FIGURES = (
    "sparsity_measured",
    "kept",
    "weights",
    "images",
    "clean",
    "attack",
    "ibp",
    "certified",
    "unstable_units",
    "validation_clean",
    "validation_certified",
    "epochs",
    "pretraining_seconds",
    "training_seconds",
    "certification_seconds",
)


def networks_csv(sections: Sequence[Section], eps: float) -> str:
    """One row a network and seed at full precision; what was not measured is empty. Times in seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*ABOUT, "sparsity", "eps", *FIGURES])
    for section in sections:
        for row in section.rows:
            for seed, net in row.nets.items():
                each = row.network
                model = model_of(net.run.config.get("model"))  # of a small dense network, its own
                about = (model, section.data, net.run.name, net.run.folder.name, seed, each.name, row.label)
                ways = (each.criterion, each.budget, each.how, each.objective)
                figures = (net.figures.get(key, "") for key in FIGURES)
                writer.writerow([*about, *(way or "" for way in ways), each.sparsity, eps, *figures])
    return out.getvalue()


def tests_csv(tests: Mapping[str, Mapping[str, list[Comparison]]]) -> str:
    """One row a comparison; McNemar's test of each seed as ``seed:only_first/only_second/p``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ["section", "question", "sparsity", "first", "second", "images", "seeds", "difference", "lower", "upper"]
    writer.writerow([*heads, "p", "p_holm", "p_clustered", "mcnemar"])
    for title, found in tests.items():
        for question, rows in found.items():
            for row in rows:
                gap = row.crossed.difference
                about = (title, question, row.sparsity, row.first.label, row.second.label, row.images, len(row.seeds))
                each = " ".join(f"{s.seed}:{s.only_first}/{s.only_second}/{s.p:.6g}" for s in row.seeds)
                values = (gap.value, gap.lower, gap.upper, row.crossed.p, row.adjusted)
                writer.writerow([*about, *("" if v is None else v for v in (*values, row.clustered)), each])
    return out.getvalue()
