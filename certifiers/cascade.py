"""The cascade: cheapest method first; only undecided inputs, and of these only undecided classes, move on.

An input is predicted, attacked, then put to one method after the other. A class that one method proved stays proven.
No method is believed on its word: every bound it claims is held against the margins that the real network shows at
the clean input, at the attacked one and at every counterexample found later; a bound above them is a contradiction,
which stops everything. A counterexample counts once it lies in the threat set and the network itself predicts it
wrongly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from certifiers.attack import attack
from certifiers.checks import check_logits
from certifiers.errors import InputError, SoundnessError
from certifiers.methods import AT_ONCE, METHODS, Answer
from certifiers.threat import Threat
from certifiers.verdict import Status, Verdict


@dataclass(frozen=True)
class Cascade:
    """What is the same for all batches.

    ``methods``: in the order to be tried. ``input_seconds``: time for each input, after which it is given up as a
    timeout (None: no limit). ``deadline``: the moment (time.monotonic) at which the whole run is to stop.
    """

    model: nn.Module
    threat: Threat
    methods: tuple[str, ...]
    attack_steps: int
    attack_restarts: int
    seed: int
    input_seconds: float | None = None
    deadline: float | None = None

    @property
    def late(self) -> bool:
        """Whether the run's time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def decide(self, x: Tensor, y: Tensor, numbers: Sequence[int]) -> list[Verdict | None]:
        """One verdict for each input of a batch; None for those that the end of the run's time cut short.

        Which these are depends on how hard each input is, so the verdicts beside a None are no fair sample.

        Raises Contradiction, and InputError for logits or answers that make no sense.
        """
        return _Batch(self, x, y, numbers).verdicts()


class Contradiction(SoundnessError):
    """A method claimed more than a concrete input allows; ``details`` are for the ledger."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


@dataclass
class _State:
    """How one input stands so far; it starts as one that is predicted right and still open."""

    status: Status = Status.unknown
    method: str = ""
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage
    finished: bool = False  # the last method answered, and not because the run's time was over

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


class _Batch:
    """One batch on its way through the cascade."""

    def __init__(self, cascade: Cascade, x: Tensor, y: Tensor, numbers: Sequence[int]) -> None:
        self.cascade, self.x, self.y, self.numbers = cascade, x, y, numbers
        self.states = [_State() for _ in numbers]
        with self._timed("clean", range(len(numbers))), torch.no_grad():
            logits = cascade.model(x.clone())  # a model may write into its input
        check_logits(logits, numbers)
        self.predictions = logits.argmax(1)
        # The smallest margins the network was seen to have, the largest ones proven, and what rounding may add.
        self.shown = _margins(logits, y)
        self.rounding = 1e3 * torch.finfo(logits.dtype).eps * (1.0 + logits.abs().amax(1, keepdim=True))
        self.proven = torch.full_like(logits, -torch.inf)
        for state, good in zip(self.states, (self.predictions == y).tolist(), strict=True):
            if not good:
                state.status, state.method = Status.misclassified, "clean"

    def verdicts(self) -> list[Verdict | None]:
        right, last = self._open(), len(self.cascade.methods) - 1
        if right:
            self._attack(right)
        for place, name in enumerate(self.cascade.methods):
            # The first method is asked about falsified inputs too, unless it is dear: that may catch it lying.
            rows = right if place == 0 and name not in AT_ONCE else self._open()
            size = AT_ONCE.get(name, max(len(rows), 1))
            for first in range(0, len(rows), size):
                if self.cascade.late:
                    break
                self._ask(name, rows[first : first + size], everything=place == 0)
                if place == last and not self.cascade.late:
                    for row in rows[first : first + size]:
                        self.states[row].finished = True
            self._give_up(last=place == last)
        return [self._verdict(row) for row in range(len(self.numbers))]

    def _open(self) -> list[int]:
        return [row for row, state in enumerate(self.states) if state.status is Status.unknown]

    def _attack(self, rows: list[int]) -> None:
        cascade, x, y = self.cascade, self.x[rows], self.y[rows]
        with self._timed("attack", rows):
            x_adv, broken = attack(
                cascade.model,
                x,
                y,
                cascade.threat,
                cascade.attack_steps,
                cascade.attack_restarts,
                seed=cascade.seed,
                indices=[self.numbers[row] for row in rows],
            )
            with torch.no_grad():
                self._see(rows, cascade.model(x_adv))
        for row, is_broken in zip(rows, broken.tolist(), strict=True):
            if is_broken:
                self.states[row].status, self.states[row].method = Status.falsified, "attack"

    def _ask(self, name: str, rows: list[int], everything: bool) -> None:
        """Put one method to these inputs, and take in what it answers."""
        classes = torch.ones_like(self.shown[rows], dtype=torch.bool) if everything else ~(self.proven[rows] > 0)
        classes = classes.scatter(1, self.y[rows, None], False)
        with self._timed(name, rows):
            found = METHODS[name](
                self.cascade.model, self.x[rows], self.y[rows], self.cascade.threat, classes, self._deadline(rows)
            )
            bounds, inputs = found if isinstance(found, Answer) else (found, None)
            if bounds.shape != classes.shape:
                raise InputError(
                    f"The method {name} must give bounds of shape {tuple(classes.shape)} (batch, classes), but gave "
                    f"{tuple(bounds.shape)}; mend it where it is defined."
                )
            broken = [] if inputs is None else self._counterexamples(rows, inputs)
        bounds = bounds.where(bounds.isfinite() & classes, -torch.inf)
        self._check_not_contradicted(name, rows, bounds)
        # Where rounding puts a bound above what was shown, the latter counts: a tie must not certify.
        self.proven[rows] = torch.maximum(self.proven[rows], torch.minimum(bounds, self.shown[rows]))
        self._settle(name, rows, broken)

    def _counterexamples(self, rows: list[int], inputs: Tensor) -> list[int]:
        """Those of `rows` for which the method's input lies in the threat set and is predicted wrongly."""
        candidates = inputs.flatten(1).isfinite().all(1).nonzero().flatten().tolist()
        if not candidates:
            return []
        some = [rows[place] for place in candidates]
        points = inputs[candidates].to(self.x)
        points = self.cascade.threat.project(self.x[some], points)
        inside = self.cascade.threat.contains(self.x[some], points)
        with torch.no_grad():
            logits = self.cascade.model(points)
        wrong = inside & logits.isfinite().all(1) & (logits.argmax(1) != self.y[some])
        for row, is_inside, logit in zip(some, inside.tolist(), logits, strict=True):
            if is_inside:
                self._see([row], logit[None])
        # What earlier methods proved must agree with what is known now.
        self._check_not_contradicted("+".join(self.cascade.methods), some, self.proven[some])
        return [row for row, is_wrong in zip(some, wrong.tolist(), strict=True) if is_wrong]

    def _see(self, rows: list[int], logits: Tensor) -> None:
        """Take in what the network shows at other inputs of these rows' threat sets."""
        self.shown[rows] = torch.minimum(self.shown[rows], _margins(logits, self.y[rows]))
        rounding = 1e3 * torch.finfo(logits.dtype).eps * (1.0 + logits.abs().amax(1, keepdim=True))
        self.rounding[rows] = torch.maximum(self.rounding[rows], rounding)

    def _settle(self, name: str, rows: list[int], broken: list[int]) -> None:
        lowest = self.proven[rows].scatter(1, self.y[rows, None], math.inf).amin(1).tolist()
        for row, margin in zip(rows, lowest, strict=True):
            state = self.states[row]
            if state.status is not Status.unknown:
                continue
            state.method = name
            if row in broken:
                state.status = Status.falsified
            elif margin > 0.0:
                state.status = Status.certified

    def _deadline(self, rows: list[int]) -> float | None:
        """When a call about these inputs must end: when their time is used up, or the run's."""
        ends = [] if self.cascade.deadline is None else [self.cascade.deadline]
        if self.cascade.input_seconds is not None:
            left = (max(self.cascade.input_seconds - self.states[row].seconds, 0.0) for row in rows)
            ends.append(time.monotonic() + sum(left))
        return min(ends, default=None)

    def _give_up(self, last: bool) -> None:
        """Open inputs whose time is used up are timeouts; so are those whose last method had to stop for it."""
        limit = self.cascade.input_seconds
        if limit is None:
            return
        slack = 0.99 if last else 1.0  # a method that heeds its deadline ends a moment before it
        for row in self._open():
            if self.states[row].seconds >= slack * limit:
                self.states[row].status = Status.timeout

    def _check_not_contradicted(self, method: str, rows: list[int], bounds: Tensor) -> None:
        """Raise where a bound (one line for each of `rows`) is above what the network showed there."""
        shown = self.shown[rows]
        over = (bounds > shown + self.rounding[rows]) & bounds.isfinite() & shown.isfinite()
        over = over.scatter(1, self.y[rows, None], False)
        if over.any():
            line, wrong = over.nonzero()[0].tolist()
            raise self._contradiction(method, rows[line], wrong, bounds[line, wrong].item())

    def _contradiction(self, method: str, row: int, wrong: int, claimed: float) -> Contradiction:
        cascade, number, label = self.cascade, self.numbers[row], int(self.y[row])
        norm, eps, shown = cascade.threat.norm, float(cascade.threat.eps), self.shown[row, wrong].item()
        details = {
            "index": number,
            "label": label,
            "class": wrong,
            "method": method,
            "claimed": claimed,
            "shown": shown,
            "norm": norm,
            "eps": eps,
            "attack_steps": cascade.attack_steps,
            "attack_restarts": cascade.attack_restarts,
            "seed": cascade.seed,
        }
        return Contradiction(
            f"The certifier {method} is unsound on this model: for input {number} (label {label}, class {wrong}) it "
            f"claims a margin of at least {claimed:g} within {norm} {eps:g}, but an input that lies within has "
            f"{shown:g}. None of its certificates for this model can be trusted; please report this with the model.",
            details,
        )

    def _verdict(self, row: int) -> Verdict | None:
        state, label = self.states[row], int(self.y[row])
        if state.status is Status.unknown and self.cascade.late and not state.finished:
            return None
        margin = self.proven[row].scatter(0, self.y[row : row + 1], math.inf).amin().item()
        tried = state.status not in (Status.misclassified, Status.falsified)
        return Verdict(
            index=self.numbers[row],
            label=label,
            prediction=int(self.predictions[row]),
            status=state.status,
            eps=float(self.cascade.threat.eps),
            norm=self.cascade.threat.norm,
            method=state.method,
            margin=margin if tried and math.isfinite(margin) else None,
            seconds=state.seconds,
            stages=state.stages,
        )

    def _timed(self, stage: str, rows: Sequence[int]) -> _Timed:
        return _Timed([self.states[row].stages for row in rows], stage)


class _Timed:
    """A with-block whose time is shared out equally among inputs, as the time of one stage."""

    def __init__(self, shares: list[dict[str, float]], stage: str) -> None:
        self.shares, self.stage = shares, stage

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        share = (time.perf_counter() - self.begin) / max(len(self.shares), 1)
        for stages in self.shares:
            stages[self.stage] = stages.get(self.stage, 0.0) + share


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """(batch, classes): logit[y] - logit[j]."""
    return logits.gather(1, y[:, None]) - logits
