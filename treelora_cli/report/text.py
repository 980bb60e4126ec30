"""The report for a terminal: tables that fit its width, colour only as an addition."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from treelora_cli.report.evidence_text import evidence_means, evidence_parts
from treelora_cli.report.groups import (
    Group as SeedGroup,
)
from treelora_cli.report.groups import (
    explained,
    final_rows,
    group_notices,
    grouped,
    plus_minus,
    printed,
    repeated,
)
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import RunReport, TaskReport
from treelora_cli.report.tables import NAME_WIDTH, plain_table
from treelora_cli.report.words import (
    HEADS,
    LIMITED,
    NOT_MEASURED,
    count,
    covers,
    duration,
    heading,
    legends,
    marked,
    missing_lines,
    notices,
    percent,
    signed,
    values,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

FILE_WIDTH = 120
"""Columns of a report that goes to a file."""

WIDE = 100
"""From this width on, tables show what scores cost too."""


def text(reports: Sequence[RunReport], width: int = FILE_WIDTH) -> str:
    """Return the report as plain text without colour.

    Args:
        reports: one run or several to compare.
        width: columns of the page.
    """
    page = io.StringIO()
    console = Console(file=page, width=width, color_system=None, highlight=False)
    console.print(renderable(reports, width), crop=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def renderable(reports: Sequence[RunReport], width: int) -> Group:
    """Return the report as one rich renderable.

    Args:
        reports: one run or several to compare.
        width: columns of the terminal; a wide matrix is shown in stretches of columns.
    """
    groups = grouped(reports)
    said = [*notices(reports), *group_notices(groups)]
    notes = [Text(f"note: {notice}", style="yellow") for notice in said]
    if len(reports) == 1:
        return Group(*_title(reports[0]), *notes, *_run(reports[0], width, alone=True))
    parts: list[RenderableType] = [Text(f"{len(reports)} runs compared", style="bold"), *notes]
    if repeated(groups):
        parts += [Text(), *_seeds(groups, width), *evidence_means(groups)]
        parts += [Text("Every run", style="bold")]
        parts += [Text(), _comparison(reports, width), Text(), *_definitions()]
        return Group(*parts, Text("A run in full: treelora report RUN", style="dim"))
    parts += [Text(), _comparison(reports, width), Text(), *_definitions()]
    means = [*evidence_means(groups)]
    parts += [Text(), *means] if means else []
    for report in reports:
        parts += [Text(), *_title(report), *_run(report, width, alone=False)]
    return Group(*parts)


def _title(report: RunReport) -> list[RenderableType]:
    facts = [
        report.path,
        report.status,
        "seed not recorded" if report.seed is None else f"seed {report.seed}",
        f"adapter mode {report.mode}",
        f"decoding {report.decoding or 'not recorded'}",
    ]
    return [Text(heading(report), style="bold"), Text(" · ".join(facts), style="dim")]


def _run(report: RunReport, width: int, alone: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [Text()]
    if alone:
        parts += [_numbers(report), Text()]
    glance = report.at_a_glance()
    if glance is not None:
        parts += [Text(LIMITED, style="yellow")]
    parts += [*_matrix(glance or report, width), _task_table(report, width), Text()]
    if report.evidence is not None:
        parts += [*evidence_parts(report.evidence, width)]
    if report.missing:
        parts += [Text("Not measured", style="bold")]
        parts += [Text(f"  {line}") for line in missing_lines(report)]
        parts += [Text()]
    parts += [
        Text(
            f"Time: training {duration(report.train_seconds)}, evaluation "
            f"{duration(report.evaluate_seconds)}, together {duration(report.total_seconds)}"
        )
    ]
    if report.command:
        # One line however long, so that it can be copied.
        command = Text(f"  {report.command}", style="cyan", no_wrap=True, overflow="ignore")
        parts += [Text("Repeat this run with:"), command]
    return parts


def _numbers(report: RunReport) -> Table:
    table = _grid()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", style="bold cyan", no_wrap=True)
    table.add_column(style="dim")
    printed = values(report)
    for key, head in HEADS.items():
        table.add_row(Text(head), Text(printed[key]), Text(DEFINITIONS[key]))
    table.add_row(Text(), Text(), Text(f"scores x 100, test split, {covers(report)}"))
    return table


def _definitions() -> Iterator[RenderableType]:
    for key, head in HEADS.items():
        yield Text(f"{head}: {DEFINITIONS[key]}", style="dim")


def _seeds(groups: Sequence[SeedGroup], width: int) -> Iterator[RenderableType]:
    """The numbers and the final scores of each group; narrow pages leave out BWT (LP)."""
    digits = 2 if width >= WIDE else 1
    keys = [key for key in HEADS if width >= WIDE or key != "bwt_lopez_paz"]
    yield Text(f"Scores x 100: {explained(groups)}", style="bold")
    yield Text()
    table = plain_table()
    table.add_column("method", overflow="fold", min_width=12)
    for head in ["n", *(HEADS[key] for key in keys)]:
        table.add_column(head, justify="right", no_wrap=True)
    for group in groups:
        numbers = printed(group, digits)
        cells = [marked(group.name, group.synthetic), str(group.n), *map(numbers.get, keys)]
        table.add_row(*(Text(cell or "") for cell in cells))
    yield table
    yield Text()
    fitting = max(1, (width - 24) // 20)
    for start in range(0, len(groups), fitting):
        yield _seed_finals(groups[start : start + fitting], digits)
        yield Text()


def _seed_finals(groups: Sequence[SeedGroup], digits: int) -> Table:
    table = plain_table()
    table.add_column("final score on", overflow="fold", min_width=12)
    for group in groups:
        table.add_column(Text(group.name), justify="right", overflow="fold")
    for label, scores in final_rows(groups):
        table.add_row(Text(label), *(Text(plus_minus(score, digits)) for score in scores))
    return table


def _comparison(reports: Sequence[RunReport], width: int) -> Table:
    table = plain_table()
    table.add_column("run", overflow="fold", min_width=12)
    heads = [*HEADS.values(), "adapter", "time"]
    for head in [*heads, "trainable"] if width >= WIDE else heads:
        table.add_column(head, justify="right", no_wrap=True)
    for report, name in zip(reports, legends(reports), strict=True):
        cells = [*values(report).values(), report.mode, duration(report.total_seconds)]
        cells += [count(report.trainable_parameters)] if width >= WIDE else []
        shown = marked(name, report.synthetic)
        table.add_row(Text(shown), *(Text(cell) for cell in cells))
    return table


def _matrix(report: RunReport, width: int) -> Iterator[RenderableType]:
    """R in as many tables as its columns need to fit; the diagonal stands in brackets."""
    if not report.matrix:
        yield Text("No task has been learned yet.", style="dim")
        yield Text()
        return
    yield Text("R: row = after learning this task, column = score on task, x 100", style="bold")
    yield Text("[ ] just learned   · not learned yet   — not measured", style="dim")
    measured = [
        (j, len(percent(score, 1)))
        for row in report.matrix
        for j, score in enumerate(row)
        if score is not None
    ]
    shown = max(report.learned, 1 + max((j for j, _ in measured), default=0))
    names = max(len(task.name) for task in report.tasks)
    # Two brackets, and a space before the next column.
    cell = 3 + max((digits for _, digits in measured), default=4)
    fitting = max(1, (width - min(names, NAME_WIDTH) - 5) // cell)
    for start in range(0, shown, fitting):
        yield Text()
        yield _matrix_part(report, range(start, min(start + fitting, shown)))
    yield Text()


def _matrix_part(report: RunReport, columns: range) -> Table:
    """Some columns of R; rows from before the first of them was learned are left out."""
    table = plain_table(gap=0)
    table.add_column("#", justify="right", style="dim")
    table.add_column("after", max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for j in columns:
        table.add_column(f"{j + 1} ", justify="right", no_wrap=True, min_width=6)
    for i, row in enumerate(report.matrix):
        cells = [row[j] for j in columns]
        measured = any(score is not None for score in cells)
        if measured or (i >= columns.start and not report.joint):
            printed = [_cell(score, i, j) for j, score in zip(columns, cells, strict=True)]
            table.add_row(Text(str(i + 1)), Text(report.tasks[i].name), *printed)
    return table


def _cell(score: float | None, i: int, j: int) -> Text:
    if score is None:
        return Text("· " if j > i else f"{NOT_MEASURED} ", style="dim")
    printed = percent(score, 1)
    if i == j:
        return Text(f"[{printed}]", style="bold cyan")
    return Text(f"{printed} ", style="dim" if j > i else "")


def _task_table(report: RunReport, width: int) -> Table:
    table = plain_table()
    table.add_column("#", justify="right", style="dim")
    table.add_column("task", overflow="fold", min_width=12)
    table.add_column("metric", overflow="fold", min_width=8)
    heads = ["zero shot", "chance", "learned", "final", "change"]
    heads += ["rows", "steps", "training"] if width >= WIDE else []
    for head in heads:
        table.add_column(head, justify="right")
    for position, task in enumerate(report.tasks, start=1):
        cells = _task_cells(task)[: len(heads) + 2]
        table.add_row(Text(str(position)), *(Text(cell) for cell in cells))
    return table


def _task_cells(task: TaskReport) -> list[str]:
    return [
        task.label,
        task.metric or NOT_MEASURED,
        percent(task.zero_shot, 1),
        percent(task.chance, 1),
        percent(task.own, 1),
        percent(task.final, 1),
        signed(task.change, 1),
        count(task.rows),
        count(task.steps),
        duration(task.train_seconds),
    ]


def _grid() -> Table:
    return Table.grid(padding=(0, 2, 0, 0))
