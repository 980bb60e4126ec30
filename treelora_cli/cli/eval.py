"""`treelora eval`: parse, hand over to the engine, print the scores."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.cli.launch import Processes, together
from treelora_cli.cli.names import names_from
from treelora_cli.cli.output import print_json, stderr, stdout
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.engine.route_run import RouteResult
    from treelora_cli.rundir.scores import Cell


class Split(StrEnum):
    """Splits that can be scored."""

    test = "test"
    eval = "eval"


class Scoring(StrEnum):
    """Ways to get an answer."""

    greedy = "greedy"
    likelihood = "likelihood"


Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With route: the base alone answers a prompt that is less typical of its nearest task "
        "than this; 0.5: one twice as far from it, in squared distance, as the task's own prompts "
        "are (default: the recipe's route.threshold, 0: never).",
        show_default=False,
    ),
]
Strip = Annotated[
    bool,
    typer.Option(
        "--strip-instructions",
        help="With route: choose by what is left of a prompt without what all of its task's "
        "training prompts share; it is answered in full.",
    ),
]
History = Annotated[
    bool,
    typer.Option(
        "--history",
        help="With route: score the tasks as after every task of the stream, which OP and BWT "
        "under routing are made from.",
    ),
]


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The run directory.", show_default=False)],
    adapter: Annotated[
        str,
        typer.Option(
            help="Who answers: [bold]latest[/bold] (the last task's adapter), [bold]own[/bold] "
            "(each task's own), [bold]route[/bold] (for every prompt that of the task it looks "
            "like: no task is named) or [bold]task:NAME[/bold]."
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
        typer.Option(
            min=1, help="Most prompts a batch (default: the recipe's).", show_default=False
        ),
    ] = None,
    scoring: Annotated[
        Scoring | None,
        typer.Option(
            help="Generate answers, or take the likeliest label where a task has a closed set of "
            "them (default: the recipe's).",
            show_default=False,
        ),
    ] = None,
    route_threshold: Threshold = None,
    strip_instructions: Strip = False,
    history: History = False,
    model: Annotated[
        str | None, typer.Option(help="Where the base is now, if it moved.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the tasks are now, if they moved.", show_default=False)
    ] = None,
    nproc: Processes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Ask a run's adapters the test rows of its tasks and score the answers.

    Answers are kept as JSON lines under tasks/*/predictions; what the same adapter
    answered to the same rows before is not computed again.

    [bold]treelora eval run --adapter own --tasks FOMC[/bold]

    [bold]treelora eval run --adapter route --history[/bold]
    """
    routing = adapter == "route"
    if not routing and (route_threshold is not None or strip_instructions or history):
        raise UsageError(
            "--route-threshold, --strip-instructions and --history belong to --adapter route",
            "add --adapter route, or leave them out",
        )
    from treelora_cli.engine.evaluate_run import EvalRequest, evaluate_run

    request = EvalRequest(
        adapter=adapter,
        tasks=names_from(tasks),
        split=split.value,
        limit=limit,
        batch_size=batch_size,
        scoring=None if scoring is None else scoring.value,
        model=model,
        data=data,
    )

    def show(event: dict[str, object]) -> None:
        if not as_json:
            when = f" after {event['after']}" if history else ""
            stderr().print(f"scored {event['task']}{when} on {event['rows']} rows", markup=False)

    with together(nproc) as world:
        if routing:
            from treelora_cli.engine.route_run import RouteRequest, route_run

            way = RouteRequest(route_threshold, strip_instructions, history)
            routed = route_run(run_dir, request, way, show, world)
        else:
            cells = evaluate_run(run_dir, request, show, world)
    if not world.first:
        return
    if routing:
        _print_routed(run_dir, routed, as_json)
    else:
        _print_cells(run_dir, cells, as_json)


def _print_cells(run_dir: Path, cells: list[Cell], as_json: bool) -> None:
    if as_json:
        print_json({"run": str(run_dir), "cells": [asdict(cell) for cell in cells]})
    else:
        _print_table(cells)


def _print_routed(run_dir: Path, result: RouteResult, as_json: bool) -> None:
    from treelora_cli.cli.routing import print_routing

    if as_json:
        cells = [asdict(cell) for cell in result.cells]
        print_json({"run": str(run_dir), "cells": cells, "routing": result.routing})
        return
    last = result.routing["learned"][-1]
    _print_table([cell for cell in result.cells if cell.after == last])
    print_routing(result)


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
