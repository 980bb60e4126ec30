"""The plain tables of every report for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

NAME_WIDTH = 24
"""Columns that the name of a task takes at most beside a matrix."""


def plain_table(gap: int = 1) -> Table:
    """A table with one line under its heads.

    Args:
        gap: spaces after each column.
    """
    return Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
