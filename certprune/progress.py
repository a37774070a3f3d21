"""How far a long job is: a live bar where there is a terminal, one plain line an epoch where there is none.

The code that does the work sees only :class:`Progress`, whose methods do nothing, so that it can be called
without a screen (tests, notebooks, other programs).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class Progress:
    """The silent one, and the interface: ``begin``, then ``advance`` and ``epoch`` at will, then ``end``."""

    def begin(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        """A piece of work of ``total`` units starts, ``done`` of them already done."""

    def advance(self, count: int, note: str = "") -> None:
        """``count`` more units are done; ``note`` says how it goes."""

    def epoch(self, number: int, epochs: int, row: Mapping[str, Any]) -> None:
        """An epoch is over; ``row`` is its line of ``metrics.jsonl``."""

    def note(self, text: str) -> None:
        """Something that the user should know, said once."""

    def end(self, summary: str = "") -> None:
        """The piece of work is over."""

    def close(self) -> None:
        """No more work, whether all went well or not."""


class PlainProgress(Progress):
    """Lines for a log file. Work without epochs speaks at most every ``interval`` seconds."""

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval
        self.title, self.total, self.done, self.unit = "", 0, 0, "images"
        self.began = self.spoke = time.monotonic()
        self.first = 0

    def begin(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        self.title, self.total, self.done, self.unit, self.first = title, total, done, unit, done
        self.began = self.spoke = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        if time.monotonic() - self.spoke >= self.interval and self.done < self.total:
            self._say(f"{self.done} of {self.total} {self.unit}, {self._pace()}" + (f", {note}" if note else ""))

    def epoch(self, number: int, epochs: int, row: Mapping[str, Any]) -> None:
        self._say(f"epoch {number}/{epochs}, {epoch_note(row)}, {self._pace()}")

    def note(self, text: str) -> None:
        self._say(text)

    def end(self, summary: str = "") -> None:
        self._say(f"done in {duration(time.monotonic() - self.began)}" + (f": {summary}" if summary else ""))

    def _pace(self) -> str:
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        return f"{rate:,.0f} {self.unit}/s, {duration(left)} left"

    def _say(self, text: str) -> None:
        self.spoke = time.monotonic()
        print(f"{self.title}: {text}", flush=True)


class LiveProgress(Progress):
    """A bar with rate and time left, how it goes below it; a line stays behind for all work that is done."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class BarsWithNote(Bars):
            note = ""

            def get_renderables(self) -> Any:
                if self.tasks:
                    yield self.make_tasks_table(self.tasks)
                    yield Text(f"  {self.note}", style="dim", no_wrap=True, overflow="ellipsis")

        self.bars = BarsWithNote(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.task: Any = None
        self.title, self.unit, self.place, self.result = "", "images", "", ""
        self.began = time.monotonic()

    def begin(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        self.title, self.unit, self.place, self.result = title, unit, "", ""
        self.began = time.monotonic()
        self.bars.note = ""
        self.bars.start()
        self.task = self.bars.add_task(title, total=total, completed=done, rate="")

    def advance(self, count: int, note: str = "") -> None:
        speed = self.bars.tasks[-1].speed
        self.bars.note = " · ".join(part for part in (self.place, note, self.result) if part)
        self.bars.update(self.task, advance=count, rate=f"{speed:,.0f} {self.unit}/s" if speed else "")

    def epoch(self, number: int, epochs: int, row: Mapping[str, Any]) -> None:
        self.place = f"epoch {min(number + 1, epochs)}/{epochs}"
        self.result = epoch_note({"validation": row["validation"]})

    def note(self, text: str) -> None:
        self.bars.console.print(f"{self.title}: {text}", highlight=False, markup=False)

    def end(self, summary: str = "") -> None:
        self.bars.remove_task(self.task)
        took = duration(time.monotonic() - self.began)
        self.bars.console.print(f"[green]✓[/green] [bold]{self.title}[/bold] {took} {summary}", highlight=False)

    def close(self) -> None:
        self.bars.stop()


def make_progress(console: Any) -> Progress:
    """A live bar if ``console`` is a terminal, else plain lines."""
    return LiveProgress(console) if console.is_terminal else PlainProgress()


def epoch_note(row: Mapping[str, Any]) -> str:
    """What to say of an epoch: both losses, and validation's accuracies where known."""
    validation = row.get("validation", {})
    losses = {"loss": row.get("train", {}).get("loss"), "validation loss": validation.get("loss")}
    parts = [f"{word} {_number(loss)}" for word, loss in losses.items() if loss is not None]
    for word in ("clean", "noisy", "attack", "certified"):
        key = f"{word}_accuracy"
        if validation.get(key) is not None:
            parts.append(f"{word} {100 * validation[key]:.1f} %")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> str:
    return f"{value:.4g}"
