"""Ledgers of randomized smoothing as a run folder holds them: ``certificates/VARIANT/smoothing-SIGMA.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certifiers.errors import InputError, SoundnessError

PREFIX = "smoothing-"


@dataclass(frozen=True)
class SmoothedView:
    """One ledger of a smoothed classifier with its header."""

    path: Path
    header: dict
    verdicts: list[Any] = field(repr=False)

    @property
    def sigma(self) -> float:
        """The noise's standard deviation, in pixels."""
        return float(self.header["sigma"])

    @property
    def model(self) -> str:
        return str(self.header.get("model", ""))

    @property
    def images(self) -> str:
        """Which images were certified, e.g. ``mnist-5k test``."""
        return " ".join(str(self.header[key]) for key in ("data", "split") if self.header.get(key))

    @property
    def seconds(self) -> float:
        return sum(verdict.seconds for verdict in self.verdicts)


def read_smoothed(folder: Path, missing: list[str], alarms: list[str]) -> list[SmoothedView]:
    """The smoothing ledgers in ``folder``, by rising sigma; what cannot be read is said in ``missing``."""
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
    return sorted(found, key=lambda ledger: ledger.sigma)
