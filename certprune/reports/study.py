"""One Markdown page for several runs of one recipe that differ in the seed: what ``results/`` holds."""

from __future__ import annotations

from collections.abc import Sequence

from certprune.reports.compare import differences
from certprune.reports.read import RunView
from certprune.reports.seeds import aggregate
from certprune.reports.tables import markdown_table

NOTES = """\
Certified accuracy: the share of test images that are classified correctly *and* proven for every perturbation of
the threat set. Attack accuracy: correct and not broken by PGD; the true robust accuracy lies between the two.
Brackets: 95 % Student t-intervals over the seeds (other training runs), or of the paired difference over seeds.
Every network is trained for the same epochs after pretraining; epochs are selected on the validation split, and
the test split was used once, for this table.
"""


def study_page(runs: Sequence[RunView], title: str, command: str, eps: float | None = None) -> str:
    """The page: a table of means over seeds, paired differences, and where the figures come from.

    Raises InputError if the runs are not the same recipe with different seeds.
    """
    eps = runs[0].main_eps if eps is None else eps
    parts = [f"# {title}", f"Made by `{command}`.", NOTES, markdown_table(aggregate(runs, eps))]
    pairs = differences(runs, eps)
    if pairs:
        parts += ["## Paired differences in certified accuracy", markdown_table(pairs)]
    parts += ["## Where the figures come from", origin(runs)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def origin(runs: Sequence[RunView]) -> str:
    """One line a run, as a Markdown list: its seed, training time, threads, processor, torch and commit."""
    lines = []
    for run in runs:
        seen = run.provenance
        hardware = seen.get("hardware", {})
        stages = seen.get("stages", {}).values()
        hours = sum(stage.get("seconds", 0.0) for stage in stages) / 3600
        lines.append(
            f"- seed {run.seed}: {hours:.2f} h of training, {seen.get('threads', '?')} thread(s) of "
            f"{hardware.get('processor', 'an unnamed processor')}, torch {seen.get('torch', '?')}, "
            f"commit {str(seen.get('git_commit'))[:10]}"
        )
    return "\n".join(lines)
