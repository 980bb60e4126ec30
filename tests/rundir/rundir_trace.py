"""Record the fault points that a piece of work passes."""

from __future__ import annotations

from collections.abc import Callable

from treelora_cli.rundir import faults

FILE_STEPS = [
    "file.tmp-opened",
    "file.half-written",
    "file.tmp-written",
    "file.synced",
    "file.replaced",
    "file.folder-synced",
]


def trace(work: Callable[[], object]) -> list[tuple[str, int]]:
    """The points in order, each with the number of the passage."""
    passed: list[str] = []
    original = faults.hit
    faults.hit = passed.append
    try:
        work()
    finally:
        faults.hit = original
    return [(point, passed[: i + 1].count(point)) for i, point in enumerate(passed)]
