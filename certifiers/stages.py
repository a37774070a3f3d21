"""How far each stage of the cascade got: how many inputs it decided, and the time it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from certifiers.verdict import Status, Verdict

DECIDED = (Status.certified, Status.falsified, Status.misclassified)


@dataclass(frozen=True)
class StageSummary:
    """One stage of many inputs' way: "clean", "attack" or a method.

    ``asked`` inputs went through it; of those it ``certified``, ``falsified`` or found ``misclassified`` so many, and
    ``left`` had it as their last stage without being decided. ``seconds``: its time, of all inputs together.
    ``asked`` and ``seconds`` are None where the ledger is of old and does not tell.
    """

    stage: str
    asked: int | None
    certified: int
    falsified: int
    misclassified: int
    left: int
    seconds: float | None

    @property
    def decided(self) -> int:
        return self.certified + self.falsified + self.misclassified


def summarise_stages(verdicts: Sequence[Verdict], order: Iterable[str] = ()) -> list[StageSummary]:
    """A row for each stage that any input went through; as in ``order`` (methods, cheapest first), others after it."""
    told = [verdict for verdict in verdicts if verdict.stages]
    seen = dict.fromkeys(["clean", "attack", *order])
    seen.update(dict.fromkeys(stage for verdict in told for stage in verdict.stages))
    seen.update(dict.fromkeys(verdict.method for verdict in verdicts))
    rows = []
    for stage in seen:
        by = [verdict.status for verdict in verdicts if verdict.method == stage]
        asked = [verdict.stages[stage] for verdict in told if stage in verdict.stages]
        if not by and not asked:
            continue
        known = len(told) == len(verdicts)
        rows.append(
            StageSummary(
                stage=stage,
                asked=len(asked) if known else None,
                certified=by.count(Status.certified),
                falsified=by.count(Status.falsified),
                misclassified=by.count(Status.misclassified),
                left=sum(status not in DECIDED for status in by),
                seconds=sum(asked) if known else None,
            )
        )
    return rows
