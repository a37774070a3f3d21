"""Each epoch's figures for TensorBoard, beside the progress that the screen shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certifiers.errors import InputError
from certprune.progress import Progress

INSTALL = "pip install 'certprune[log]'"


class TensorBoard(Progress):
    """Passes everything on to ``shown``, and writes each epoch's row below ``folder``, a subfolder for each stage.

    Scalars are named as in ``metrics.jsonl`` (``train/loss``, ``validation/certified_accuracy``, ``lr``), the step is
    the epoch. A run that is resumed goes on with the same curves. Raises InputError, at once, where TensorBoard is
    not installed.
    """

    def __init__(self, shown: Progress, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"--tensorboard needs the package tensorboard, which cannot be imported here ({error}). Install it: "
                f"{INSTALL}"
            ) from error
        self.shown, self.folder, self._writer_of, self._writer, self._title = shown, folder, SummaryWriter, None, ""

    def begin(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        self._title = title
        self.shown.begin(title, total, unit, done)

    def advance(self, count: int, note: str = "") -> None:
        self.shown.advance(count, note)

    def epoch(self, number: int, epochs: int, row: Mapping[str, Any]) -> None:
        self.shown.epoch(number, epochs, row)
        if self._writer is None:
            place = re.sub(r"[^\w.+-]+", "_", self._title)
            self._writer = self._writer_of(str(self.folder / place))
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def note(self, text: str) -> None:
        self.shown.note(text)

    def end(self, summary: str = "") -> None:
        self.shown.end(summary)
        self._finish()

    def close(self) -> None:
        self.shown.close()
        self._finish()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _scalars(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a row by their path, without its counters."""
    found = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("epoch", "step"):
            found.append((prefix + key, float(value)))
    return found
