"""An append-only file of JSON lines that no kill can spoil: the file behind a ledger.

The first line appears together with the file (temporary file, then rename). Every further batch of lines is
written at once and synced to the disk. A process killed while it writes leaves at most one line without its
newline at the end, and that line is cut off when the file is opened again. Any other damage is an error, and
the file is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from certifiers.errors import InputError
from certifiers.files import write_bytes

try:
    import fcntl
except ImportError:  # not a POSIX system: one writer at a time is then up to the user
    fcntl = None

REMEDY = "Nothing was changed. Restore the file from a copy, or move it away to certify these inputs again."


def create(path: Path, *rows: Mapping[str, Any]) -> None:
    """Make `path` with a line for each row, wholly or not at all; its folder is made if need be."""
    write_bytes(path, b"".join(map(_line, rows)))


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of `path` as objects, and the number of bytes they fill; nothing is changed.

    What follows the last newline is a line cut short, and is left out. Raises InputError for a file that is
    missing or has no complete line, and, naming the line, for a complete line that is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"The ledger {path} cannot be read ({error.strerror}). Check the path.") from error
    end = content.rfind(b"\n") + 1
    if end == 0:
        raise InputError(f"{path} is not a ledger: its first line, the header, is incomplete. {REMEDY}")
    rows = []
    for number, line in enumerate(content[: end - 1].split(b"\n"), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"Line {number} of the ledger {path} is damaged: no JSON object. {REMEDY}")
        rows.append(row)
    return rows, end


class Appender:
    """The one writer of an existing journal; it holds the file locked until :meth:`close`.

    Raises InputError where another process writes to the file. Call :meth:`cut` before the first append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        self._end = 0

    def cut(self, end: int) -> None:
        """Drop everything after the first `end` bytes: the line that a kill cut short."""
        if os.fstat(self._file.fileno()).st_size > end:
            self._file.truncate(end)
        self._end = end

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one line per row and sync; if that fails midway, the file is put back to what it was."""
        content = memoryview(b"".join(_line(row) for row in rows))
        self._check_place()
        self._file.seek(self._end)
        written = 0
        try:
            while written < len(content):
                written += self._file.write(content[written:])
            os.fsync(self._file.fileno())
        except BaseException:  # a full disk or Ctrl-C: half a line must not stay in front of the next one
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += written

    def rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put these lines, the header's first, in the place of all that are there, or none of them on an error."""
        content = b"".join(_line(row) for row in rows)
        self._check_place()
        before = self._file
        if fcntl is None:
            before.close()  # such systems rename nothing onto an open file
        write_bytes(self.path, content)
        self._file, self._end = _opened(self.path), len(content)
        before.close()

    def close(self) -> None:
        """Release the file; closing twice does no harm."""
        self._file.close()

    def _check_place(self) -> None:
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise InputError(
                f"The ledger {self.path} was removed or replaced while verdicts were being written to it. "
                "Start the command again to go on with the file that is there now."
            )


def _opened(path: Path) -> BinaryIO:
    """The file, locked; InputError where that cannot be."""
    try:
        file = open(path, "r+b", buffering=0)  # noqa: SIM115 (closed by Appender.close)
    except OSError as error:
        raise InputError(
            f"The ledger {path} cannot be opened for writing ({error.strerror}). Check the path."
        ) from error
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise InputError(
                f"The ledger {path} is being written by another process. Wait for it to end, or give "
                "another path; nothing was changed."
            ) from error
    return file


def _line(row: Mapping[str, Any]) -> bytes:
    # Python writes the shortest digits that give back the same float, so figures survive the round trip.
    return json.dumps(row, allow_nan=False).encode() + b"\n"
