"""The evidence per pair of tasks for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from treelora_cli.report.evidence import (
    EVIDENCE_HEADS,
    MEAN_HEADS,
    MEANS_MEANING,
    MEANS_TITLE,
    PAIR_KEYS,
    TASK_KEYS,
    TITLE,
    compared,
    figure_title,
    means_line,
    means_rows,
    sentence,
    shown,
    task_rows,
)
from treelora_cli.report.groups import Group
from treelora_cli.report.model import Evidence
from treelora_cli.report.tables import NAME_WIDTH, plain_table
from treelora_cli.report.words import marked

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_CELL = 8
"""Columns of a number of a pair with the space before it."""


def evidence_parts(evidence: Evidence, width: int) -> Iterator[RenderableType]:
    """The evidence of one run.

    Args:
        evidence: its numbers.
        width: columns of the page; a wide triangle is shown in stretches of columns.
    """
    yield Text(TITLE, style="bold")
    yield from (Text(note, style="yellow") for note in evidence.notes)
    if evidence.names:
        yield Text(compared(evidence), style="dim")
        yield Text()
        yield _tasks(evidence)
        yield Text()
        for key in PAIR_KEYS:
            yield from _pairs(evidence, key, width)
        yield Text(means_line(evidence))
    yield Text()


def evidence_means(groups: Sequence[Group]) -> Iterator[RenderableType]:
    """The means of several groups of runs; nothing where there are none."""
    rows = means_rows(groups)
    if not rows:
        return
    yield Text(MEANS_TITLE, style="bold")
    yield Text(MEANS_MEANING, style="dim")
    yield Text()
    table = plain_table()
    table.add_column("method", overflow="fold", min_width=12)
    for head in ("ΔW", *MEAN_HEADS.values()):
        table.add_column(head, justify="right", overflow="fold")
    for group, cells in rows:
        table.add_row(Text(marked(group.name, group.synthetic)), *map(Text, cells))
    yield table
    yield Text()


def _tasks(evidence: Evidence) -> Table:
    table = plain_table()
    table.add_column("#", justify="right", style="dim")
    table.add_column("task", overflow="fold", min_width=12)
    for key in TASK_KEYS:
        table.add_column(EVIDENCE_HEADS[key], justify="right", no_wrap=True)
    for number, name, cells in task_rows(evidence):
        table.add_row(Text(str(number)), Text(name), *map(Text, cells))
    return table


def _pairs(evidence: Evidence, key: str, width: int) -> Iterator[RenderableType]:
    """The lower triangle of a number, in as many tables as its columns need to fit."""
    last = len(evidence.names) - 1
    if last < 1:
        return
    yield Text.assemble((f"{figure_title(key)}. ", "bold"), (sentence(key), "dim"))
    names = min(NAME_WIDTH, max(map(len, evidence.names)))
    fitting = max(1, (width - names - 5) // _CELL)
    for start in range(0, last, fitting):
        yield Text()
        yield _stretch(evidence, key, range(start, min(start + fitting, last)))
    yield Text()


def _stretch(evidence: Evidence, key: str, columns: range) -> Table:
    table = plain_table(gap=0)
    table.add_column("#", justify="right", style="dim")
    table.add_column("", max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for j in columns:
        table.add_column(str(evidence.places[j] + 1), justify="right", min_width=_CELL - 2)
    rows = getattr(evidence, key)
    for i in range(columns.start + 1, len(rows)):
        cells = [shown(key, rows[i][j]) if j < i else "" for j in columns]
        table.add_row(Text(str(evidence.places[i] + 1)), Text(evidence.names[i]), *map(Text, cells))
    return table
