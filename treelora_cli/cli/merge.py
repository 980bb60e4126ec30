"""`treelora merge`: fewer adapters than tasks, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.cli.names import names_from
from treelora_cli.cli.output import print_json, stderr, stdout, write_out
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.engine.merge_run import Step

HEADS = ("adapters", "OP", "merged", "distance", "relative", "error")


class Format(StrEnum):
    """How a table is written."""

    table = "table"
    md = "md"
    json = "json"


def merge(
    run: Annotated[Path, typer.Argument(help="The run directory.", show_default=False)],
    to: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="K",
            help="Merge until K adapters are left, the newest task's included, which is never "
            "merged: training goes on from it. The merged ones are replaced in the run.",
            show_default=False,
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Write nothing: merge in memory from all adapters down to one, and score each "
            "task through the adapter that then answers for it, after every merge.",
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="With --curve: tasks to ask, separated by commas (default: all trained).",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="With --curve: rows a task, for a look.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With --curve: where the base is now.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="With --curve: where the tasks are now.", show_default=False),
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="How to print it; md is Markdown.")
    ] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Merge the adapters of a finished run that change the weights most alike.

    The two nearest (Frobenius distance of their weight changes s B A over all modules) become
    the mean of their changes, each counted with the tasks it stands for, cut back to the rank;
    and so on. [bold]own[/bold] and [bold]route[/bold] then answer through the merged adapter,
    [bold]latest[/bold] is untouched. There is no way back: look at [bold]--curve[/bold] first,
    or copy the run.

    distance is that of the two, relative over the mean of their norms; error is how far the
    weights that answered before have moved, over their norm (root mean square over the tasks).

    [bold]treelora merge run --curve --limit 50[/bold]

    [bold]treelora merge run --to 4[/bold]
    """
    if (to is None) == (not curve):
        raise UsageError("say what to do", "either --to K, which merges, or --curve, which looks")
    if not curve and (tasks or limit or model or data):
        raise UsageError(
            "--tasks, --limit, --model and --data belong to --curve", "--to asks no task anything"
        )
    chosen = Format.json if as_json else format_
    if to is not None:
        _merge(run, to, chosen)
    else:
        _curve(run, {"tasks": names_from(tasks), "limit": limit, "model": model, "data": data},
               chosen)  # fmt: skip


def _merge(run: Path, to: int, chosen: Format) -> None:
    from treelora_cli.engine.merge_run import merge_run

    merges = merge_run(run, to)
    if chosen is Format.json:
        print_json({"run": str(run), "merges": merges})
    elif merges:
        _print_rows(HEADS[2:], (_merged(one) for one in merges), chosen)
    else:
        stderr().print(f"nothing to merge: the run has no more than {to} adapters", markup=False)


def _curve(run: Path, request: dict[str, Any], chosen: Format) -> None:
    from treelora_cli.engine.evaluate_run import EvalRequest
    from treelora_cli.engine.merge_run import merge_curve

    def show(event: dict[str, Any]) -> None:
        if chosen is not Format.json:
            stderr().print(f"scored {event['task']} on {event['rows']} rows", markup=False)

    steps = list(merge_curve(run, EvalRequest(adapter="own", **request), show))
    if chosen is Format.json:
        print_json({"run": str(run), "steps": [asdict(step) for step in steps]})
        return
    if steps[0].limited:
        stderr().print("rows are limited: these scores are to look at, they are no OP")
    _print_rows(HEADS, map(_row, steps), chosen)


def _row(step: Step) -> tuple[str, ...]:
    merged = _merged(step.merge) if step.merge else ("", "", "", "")
    return (str(step.adapters), f"{100 * step.op:.2f}", *merged)


def _merged(merge: dict[str, Any]) -> tuple[str, ...]:
    sides = " with ".join(" + ".join(side) for side in merge["sides"])
    numbers = (merge["distance"], merge["relative_distance"], merge["error"])
    return (sides, *(f"{number:.3g}" for number in numbers))


def _print_rows(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], chosen: Format) -> None:
    if chosen is Format.md:
        from treelora_cli.report.markdown import escaped, table

        write_out(table(heads, [[escaped(cell) for cell in row] for row in rows]))
        return
    from rich.table import Table

    shown = Table(*heads)
    for row in rows:
        shown.add_row(*row)
    stdout().print(shown, markup=False)
