"""events.jsonl: what happened, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import logging
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from treelora_cli.rundir import faults
from treelora_cli.rundir.jsonfile import parse_object, read_bytes
from treelora_cli.rundir.storage import storage_errors

MAX_BYTES = 2 * 1024**3

log = logging.getLogger("treelora")


class EventLog:
    """Appends events to a file; only the lock's owner may.

    Args:
        path: the file; it is created by the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fresh_line = False

    def append(self, kind: str, /, *, sync: bool = False, **fields: object) -> dict[str, Any]:
        """Write one event.

        Args:
            kind: ``task_started``, ``step``, …; becomes the key ``kind``.
            sync: also flush to the device (once a task, not once a step).
            fields: JSON values; NaN and infinities become null.

        Returns:
            The event as written, with ``time`` (ISO 8601, UTC) and ``kind``.

        Raises:
            EnvironmentProblem: the disk is full.
            RunDirError: another failure of the file system.
        """
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind}
        event.update(_plain(fields))
        text = json.dumps(event, ensure_ascii=False, allow_nan=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        with storage_errors(self.path, "append to"):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
            try:
                self._write(descriptor, line)
                if sync:
                    os.fsync(descriptor)
                    faults.hit("events.synced")
            finally:
                os.close(descriptor)
        return event

    def _write(self, descriptor: int, line: bytes) -> None:
        """Write a line; begin a fresh one where the last writer was stopped inside a line."""
        size = os.fstat(descriptor).st_size
        if not self._fresh_line and size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        self._fresh_line = False
        faults.hit("events.opened")
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        self._fresh_line = True
        faults.hit("events.appended")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file in order; a missing file has none.

    A line that is no JSON object (its writer was killed) is left out, with one log warning.

    Raises:
        RunDirError: the file is a link, no regular file, or cannot be read.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return []
    events: list[dict[str, Any]] = []
    torn: list[int] = []
    for number, line in enumerate(read_bytes(path, MAX_BYTES).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            event = parse_object(line)
            if not isinstance(event.get("kind"), str):
                raise ValueError("an event has a kind")
        except (ValueError, RecursionError):
            torn.append(number)
        else:
            events.append(event)
    if torn:
        log.warning(
            "%s: left out %d line(s) that are no events, the first is line %d (a run was "
            "stopped while writing it)",
            path,
            len(torn),
            torn[0],
        )
    return events


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"an event cannot hold a {type(value).__name__}")
