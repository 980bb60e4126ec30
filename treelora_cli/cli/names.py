"""Lists of names as people give them: with commas, in a file, or on standard input."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from treelora_cli.errors import UsageError

POLL_SECONDS = 0.2


def names_from(text: str | None) -> list[str] | None:
    """Return the names in ``A,B`` or in the file of ``@file`` (one a line or with commas).

    In a file, ``#`` begins a comment.

    Args:
        text: what the user gave, or None.

    Raises:
        UsageError: the file cannot be read.
    """
    if text is None:
        return None
    if text.startswith("@"):
        return [name for line in _lines(Path(text[1:])) for name in split_names(line)]
    return split_names(text)


def split_names(line: str) -> list[str]:
    """Return the names of one line, without comment and surrounding space."""
    return [name.strip() for name in line.partition("#")[0].split(",") if name.strip()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            f"the list of names {str(path)!r} cannot be read: {reason}",
            "give a text file with one name a line after the @",
        ) from None


def arriving(wait: Callable[[], None]) -> Iterator[str]:
    """Yield names from standard input as they come, until it ends.

    Args:
        wait: called a few times a second while nothing comes; may raise to stop.
    """
    waiting = b""
    source = sys.stdin.fileno()
    while True:
        while not select.select([source], [], [], POLL_SECONDS)[0]:
            wait()
        wait()
        read = os.read(source, 65536)
        waiting += read
        *lines, waiting = waiting.split(b"\n")
        for line in lines if read else [waiting]:
            yield from split_names(line.decode("utf-8", "replace"))
        if not read:
            return
