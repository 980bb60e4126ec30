"""What the library logs, as people read it: one plain line each on stderr."""

from __future__ import annotations

import logging
import os
import sys

from treelora_cli.cli.launch import rank


def set_up_logging(*, debug: bool) -> None:
    """Send logs to stderr: notes and warnings of our own, errors alone of other libraries.

    Args:
        debug: everything, with level and origin.
    """
    if not debug:
        # Both print through handlers of their own; the variables are read when they are imported.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler(sys.stderr)
    if debug:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(PlainFormatter())
        handler.addFilter(ours_or_errors)
        handler.addFilter(NotesOnce())
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, handlers=[handler])
    # Of several processes the first speaks for all.
    level = logging.ERROR if rank() else logging.INFO
    logging.getLogger("treelora").setLevel(logging.DEBUG if debug else level)


def ours_or_errors(record: logging.LogRecord) -> bool:
    """Say whether a record is our own, or another library's error.

    A library's logger may have a level of its own, which the root logger's does not lift.
    """
    return record.name.partition(".")[0] == "treelora" or record.levelno >= logging.ERROR


class PlainFormatter(logging.Formatter):
    """``note: ...`` and ``warning: ...``, without the names of levels and loggers."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        kind = "note" if record.levelno == logging.INFO else record.levelname.lower()
        return f"{kind}: {record.getMessage()}"


class NotesOnce(logging.Filter):
    """Let every note pass once: a sweep reads the same data for each of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is to be shown."""
        if record.levelno != logging.INFO:
            return True
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new
