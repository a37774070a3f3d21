"""Ledgers of randomized smoothing as a run folder holds them: ``certificates/VARIANT/smoothing-SIGMA.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from certifiers.errors import InputError, SoundnessError
from certifiers.verdict import Accuracy
from certprune.reports.asked import asked_count, asked_images
from certprune.reports.headers import HeaderView

PREFIX = "smoothing-"
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # where tables show certified accuracy, unless the recipe says otherwise


@dataclass(frozen=True)
class SmoothedView(HeaderView):
    """One ledger of a smoothed classifier with its header."""

    verdicts: list[Any] = field(repr=False)

    @property
    def sigma(self) -> float:
        """The noise's standard deviation, in pixels."""
        return float(self.header["sigma"])

    @property
    def norm(self) -> str:
        """In which the radii are: "l2", or "l1" of uniform noise."""
        return str(self.header.get("norm") or "l2")

    @property
    def rule(self) -> str:
        """What is not as in Cohen et al.: the stopping rule and shared noise, in a few words; "" for neither."""
        stopping = self.header.get("stopping") or {}
        radii = ", ".join(f"{radius:g}" for radius in stopping.get("radii") or ())
        words = [f"tolerance {stopping['tolerance']:g}"] if stopping.get("tolerance") else []
        words += [f"up to {stopping['up_to']:g}"] if stopping.get("up_to") else []
        words += [f"decide {radii}"] if radii else []
        words += ["shared noise"] if self.header.get("shared_noise") else []
        return ", ".join(words)

    @property
    def usual(self) -> bool:
        """Whether n0, n and alpha are the recipe's: others are told by a suffix of the file's name."""
        return self.path.stem == f"{PREFIX}{self.sigma:g}"

    @property
    def settings(self) -> tuple:
        """What sets ledgers of one network apart."""
        return (self.sigma, *(self.header.get(key) for key in ("n0", "n", "alpha")), self.norm, self.rule)

    @cached_property
    def indices(self) -> frozenset[int]:
        """Which images of the split are decided."""
        return frozenset(verdict.index for verdict in self.verdicts)

    @property
    def seconds(self) -> float:
        return sum(verdict.seconds for verdict in self.verdicts)


def ledger_at(ledgers: Sequence[SmoothedView], sigma: float) -> SmoothedView | None:
    """The ledger at ``sigma`` by the recipe's own n0, n and alpha."""
    return next((ledger for ledger in ledgers if ledger.usual and ledger.sigma == sigma), None)


def accuracy_at(ledger: SmoothedView, radius: float) -> Accuracy:
    """The share that is right with a certified radius of at least ``radius``; at 0, right without abstaining."""
    from certifiers.smoothing import certified_accuracy

    return certified_accuracy(ledger.verdicts, radius)


def read_smoothed(folder: Path, missing: list[str], alarms: list[str]) -> list[SmoothedView]:
    """The smoothing ledgers in ``folder``, by rising sigma, those by the recipe's n0, n and alpha first.

    What cannot be read is said in ``missing``.
    """
    found = []
    for path in sorted(folder.glob(f"{PREFIX}*.jsonl")):
        from certifiers.smoothing import read_smoothed_ledger  # most runs hold none

        try:
            header, verdicts = read_smoothed_ledger(path)
        except InputError as error:
            missing.append(f"{folder.name}: {path.name} cannot be read: {error}")
            continue
        except SoundnessError as error:
            alarms.append(str(error))
            continue
        if verdicts and "sigma" in header:
            found.append(SmoothedView(path, header, verdicts))
    return sorted(found, key=lambda ledger: (ledger.sigma, not ledger.usual))


def smoothing_settings(config: dict) -> dict:
    """What a run's recipe says of smoothing; empty where it is not certified so."""
    return (config.get("certify") or {}).get("smoothing") or {}


def shown_radii(config: dict) -> tuple[float, ...]:
    """The radii at which tables show certified accuracy."""
    return tuple(map(float, smoothing_settings(config).get("radii") or RADII))


def missing_smoothing(variants: Sequence[Any], config: dict) -> list[str]:
    """The variants' smoothing ledgers at the recipe's sigma, if it has one, that are absent or not whole."""
    settings = smoothing_settings(config)
    sigma = settings.get("sigma")
    if sigma is None:
        return []
    held = {variant.name: ledger_at(variant.smoothed, sigma) for variant in variants}
    asked = asked_images(asked_count(config, settings), [ledger.indices for ledger in held.values() if ledger])
    missing = []
    for variant in variants:
        trained, ledger = variant.stages.get("finetune"), held[variant.name]
        if ledger is None and trained and trained.complete:
            missing.append(f"{variant.name}: not certified yet by smoothing with sigma {sigma:g}.")
        elif ledger is not None and not asked <= ledger.indices:
            done = f"only {len(asked & ledger.indices):,} of {len(asked):,} images are decided"
            missing.append(f"{variant.name}: by smoothing with sigma {sigma:g} {done}.")
    return missing
