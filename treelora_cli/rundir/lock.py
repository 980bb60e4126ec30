"""One writer at a time: an operating-system lock, and a note of who holds it."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from treelora_cli.errors import BusyError, RunDirError
from treelora_cli.rundir.files import ensure_dir, write_json
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.storage import explain

if TYPE_CHECKING:
    from filelock import BaseFileLock

OS_LOCK = ".lock"
HOLDER = "lock"
_PATIENCE = 0.4
"""Seconds that a starter waits for the holder to write down who it is."""

log = logging.getLogger("treelora")


class RunLock:
    """The right to write to a run directory, for the length of a ``with`` block.

    The lock is the operating system's: it is gone the moment its process is, however it died.
    The file ``lock`` only tells people who holds it; nothing is decided by it.

    Args:
        run_dir: the run directory.
        command: what the holder is doing; the command line by default.
        create: make the directory if it is missing.
    """

    def __init__(self, run_dir: Path, command: str = "", *, create: bool = False) -> None:
        self.path = Path(run_dir)
        self.command = command or _command_line()
        self._create = create
        self._since = ""
        self._pid = 0
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            BusyError: another process has it; the message says which.
            RunDirError: the directory is missing or cannot be written to.
            EnvironmentProblem: the disk is full.
        """
        from filelock import FileLock, Timeout

        if self._create:
            ensure_dir(self.path)
        elif not self.path.is_dir():
            raise RunDirError(f"there is no run directory {self.path}", "check the path")
        lock = FileLock(self.path / OS_LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise _busy(self.path) from None
        except OSError as error:
            raise explain(error, self.path, "write to") from error
        self._lock = lock
        self._pid = os.getpid()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.note("")
        except BaseException:
            self.release()
            raise
        return self

    def note(self, text: str) -> None:
        """Write down who holds the lock, and what it is doing if that is worth saying.

        Args:
            text: such as ``"waiting for task names on standard input"``; may be empty.
        """
        document = {
            "command": self.command,
            "host": socket.gethostname(),
            "note": text,
            "pid": os.getpid(),
            "since": self._since,
        }
        write_json(self.path / HOLDER, document)

    def release(self) -> None:
        """Give the lock back; harmless if it is not held."""
        if self._lock is None or self._pid != os.getpid():
            return  # a forked child leaves its parent's lock alone
        with suppress(OSError):
            (self.path / HOLDER).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        self.release()


def _busy(run_dir: Path) -> BusyError:
    holder = _living_holder(run_dir)
    if holder is None:
        who = "another process"
    else:
        who = f"process {holder['pid']} on {holder['host']} ({holder['command']})"
        who += f" since {holder['since']}"
        if holder.get("note"):
            who += f", {holder['note']}"
    return BusyError(
        f"the run directory {run_dir} is in use by {who}",
        "wait until it is done or stop it; reading (report, tree show) needs no lock",
    )


def _living_holder(run_dir: Path) -> dict[str, object] | None:
    """Return what the holder wrote; a dead process's note counts as not written yet."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(RunDirError):
            holder = read_json(run_dir / HOLDER, max_bytes=65536)
            if _complete(holder) and not _dead(holder):
                return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _complete(holder: dict[str, object]) -> bool:
    pid = holder.get("pid")
    texts = all(isinstance(holder.get(name), str) for name in ("command", "host", "since"))
    return texts and isinstance(pid, int) and pid > 0


def _dead(holder: dict[str, object]) -> bool:
    pid = holder["pid"]
    if holder["host"] != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _command_line() -> str:
    arguments = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    return shlex.join(arguments)[:400]
