"""How sparsity comes about over a stage: pure functions of the step, so that a resumed stage goes on the same.

To add one: a frozen class with the methods of :class:`OneShot`, and a line in `SCHEDULES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class OneShot:
    """The final sparsity from the first step on.

    Steps count from 0 to below the stage's `steps`. Masks are set anew every `every` steps (more often in a stage of
    less than 20 times as many), and hold until then.
    """

    every: int = 10
    trains_weights: ClassVar[bool] = False  # even where the criterion alone would train nothing
    rewinding: ClassVar[bool] = False  # whether there is a step at which weights go back

    def moves(self, step: int, steps: int) -> bool:
        """Whether masks are set anew before this step."""
        return step == self.last_move(step, steps)

    def last_move(self, step: int, steps: int) -> int:
        """The step, this one or one before it, at which masks were last set."""
        return step - step % max(1, min(self.every, steps // 20))

    def sparsity(self, final: float, step: int, steps: int) -> float:
        """The sparsity to set the masks to at this step."""
        return final

    def settled(self, step: int, steps: int) -> bool:
        """Whether the masks that hold in this step have the final sparsity; so it is in every stage's last step."""
        return True

    def rewinds(self, step: int, steps: int) -> bool:
        """Whether the weights go back before this step to those that the stage began with."""
        return False

    def progress(self, step: int, steps: int) -> float:
        """What the learning rate follows: the fraction done of the stage, or of the time since weights rewound."""
        return step / steps


@dataclass(frozen=True)
class Gradual(OneShot):
    """From 0 up along 1 - (1 - t)^power, t going from 0 to 1 between `start` and `end` (Zhu & Gupta 2017: cubic).

    `start` and `end` are fractions of the stage, `end` at most 0.95.
    """

    start: float = 0.0
    end: float = 0.6
    power: float = 3.0
    trains_weights: ClassVar[bool] = True

    def sparsity(self, final: float, step: int, steps: int) -> float:
        t = max((step + 1) / steps - self.start, 0.0) / (self.end - self.start)
        return final * (1 - (1 - t) ** self.power) if t < 1 else final

    def settled(self, step: int, steps: int) -> bool:
        return (self.last_move(step, steps) + 1) / steps >= self.end


@dataclass(frozen=True)
class Iterative(OneShot):
    """Prune, rewind the weights to where the stage began, train; and again (Frankle et al. 2019).

    Each of the `rounds` begins with pruning, by the weights that training has come to; the first by the pretrained
    ones, which are also what weights rewind to. Every round removes the same fraction of what is left. Needs at least
    as many steps as rounds.
    """

    rounds: int = 3
    trains_weights: ClassVar[bool] = True
    rewinding: ClassVar[bool] = True

    def last_move(self, step: int, steps: int) -> int:
        return -(-self._round(step, steps) * steps // self.rounds)

    def sparsity(self, final: float, step: int, steps: int) -> float:
        done = (self._round(step, steps) + 1) / self.rounds
        return 1 - (1 - final) ** done if done < 1 else final

    def settled(self, step: int, steps: int) -> bool:
        return self._round(step, steps) == self.rounds - 1

    def rewinds(self, step: int, steps: int) -> bool:
        return step > 0 and self.moves(step, steps)

    def progress(self, step: int, steps: int) -> float:
        return (step * self.rounds % steps) / steps

    def _round(self, step: int, steps: int) -> int:
        return step * self.rounds // steps


SCHEDULES: dict[str, type[OneShot]] = {"gradual": Gradual, "iterative": Iterative, "one_shot": OneShot}
