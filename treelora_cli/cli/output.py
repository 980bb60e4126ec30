"""Where output goes: results to stdout, everything said to people while working to stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1

PIPE_WIDTH = 200
"""Columns where no terminal says how many there are."""


def stdout() -> Console:
    """Return the console for results: colour only on a terminal, room for tables in a pipe."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """Let the command line end quietly instead of with rich's exit code 1."""
            raise BrokenPipeError

    if sys.stdout.isatty():
        return Output(highlight=False)
    return Output(width=PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Return the console for progress, logs and errors."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """Write one JSON document with ``schema_version`` to stdout."""
    body = {"schema_version": SCHEMA_VERSION, **document}
    write_out(json.dumps(body, ensure_ascii=False, indent=2, allow_nan=False))


def print_json_line(document: dict[str, Any]) -> None:
    """Write one JSON document with ``schema_version`` to stdout as a single line."""
    body = {"schema_version": SCHEMA_VERSION, **document}
    write_out(json.dumps(body, ensure_ascii=False, allow_nan=False))


def write_out(text: str) -> None:
    """Write a line to stdout at once.

    Raises:
        BrokenPipeError: the reader is gone; without an errno, because typer turns one that has
            it into exit code 1.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError from None
