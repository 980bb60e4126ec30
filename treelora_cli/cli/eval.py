"""`treelora eval`: parse, hand over to the engine, print the scores."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.cli.names import names_from
from treelora_cli.cli.output import print_json, stderr, stdout

if TYPE_CHECKING:
    from treelora_cli.rundir.scores import Cell


class Split(StrEnum):
    """Splits that can be scored."""

    test = "test"
    eval = "eval"


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The run directory.", show_default=False)],
    adapter: Annotated[
        str,
        typer.Option(
            help="Who answers: [bold]latest[/bold] (the last task's adapter), [bold]own[/bold] "
            "(each task's own) or [bold]task:NAME[/bold]."
        ),
    ] = "latest",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks to ask, separated by commas (default: all trained).", show_default=False
        ),
    ] = None,
    split: Annotated[Split, typer.Option(help="Which rows to ask.")] = Split.test,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows a task; such scores never enter OP and BWT.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts a batch (default: the recipe's).", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base is now, if it moved.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the tasks are now, if they moved.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Ask a run's adapters the test rows of its tasks and score the answers.

    Answers are kept as JSON lines under tasks/*/predictions; cells scored before
    with the same adapter and rows are not computed again.

    [bold]treelora eval run --adapter own --tasks FOMC[/bold]
    """
    from treelora_cli.engine.evaluate_run import EvalRequest, evaluate_run

    request = EvalRequest(adapter, names_from(tasks), split.value, limit, batch_size, model, data)

    def show(event: dict[str, object]) -> None:
        if not as_json:
            stderr().print(f"scored {event['task']} on {event['rows']} rows", markup=False)

    cells = evaluate_run(run_dir, request, show)
    if as_json:
        print_json({"run": str(run_dir), "cells": [asdict(cell) for cell in cells]})
    else:
        _print_table(cells)


def _print_table(cells: list[Cell]) -> None:
    from rich.table import Table

    table = Table("task", "adapter", "after", "rows", "metric", "score", "other readings")
    for cell in cells:
        others = {key: value for key, value in cell.scores.items() if key != "score"}
        readings = "  ".join(f"{key} {value:.3f}" for key, value in sorted(others.items()))
        after = cell.after or "-"
        rows = f"{cell.rows}{' (limited)' if cell.limited else ''}"
        table.add_row(
            cell.task, cell.adapter, after, rows, cell.metric, f"{cell.score:.3f}", readings
        )
    stdout().print(table)
