"""Print where prompts were sent: a table by task, then what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treelora_cli.cli.output import stdout

if TYPE_CHECKING:
    from treelora_cli.engine.route_run import RouteResult

MOST_OTHERS = 3
"""Other tasks that are named of those that a task's prompts were sent to."""


def print_routing(result: RouteResult) -> None:
    """Print how the rows of each task were routed, and the numbers of a history."""
    from rich.table import Table

    routing, console = result.routing, stdout()
    shown = Table("task", "prompts", "to its own task", "to its own adapter", "elsewhere")
    for name, counts in zip(
        routing["confusion"]["rows"], routing["confusion"]["counts"], strict=True
    ):
        one = routing["per_task"][name]
        shares = (f"{one['accuracy']:.1%}", f"{one['own_adapter']:.1%}")
        shown.add_row(name, str(one["rows"]), *shares, _elsewhere(routing, name, counts))
    console.print(shown, markup=False)
    for line in (*_summary(routing), *_history(result)):
        console.print(line, markup=False, soft_wrap=True)


def _elsewhere(routing: dict[str, Any], own: str, counts: list[int]) -> str:
    columns = routing["confusion"]["columns"]
    at = routing["learned"].index(own)
    others = [
        (count, columns[number]) for number, count in enumerate(counts) if count and number != at
    ]
    others.sort(key=lambda other: -other[0])
    named = [f"{name} {count}" for count, name in others[:MOST_OTHERS]]
    left = sum(count for count, _ in others[MOST_OTHERS:])
    return ", ".join([*named, f"{left} more"] if left else named)


def _summary(routing: dict[str, Any]) -> list[str]:
    took = routing["ms_per_query"]
    exact = "every task" if routing["exact"] else "a search over the tasks' tree"
    lines = [
        f"{routing['accuracy']:.1%} of a task's prompts are sent to it, "
        f"{routing['own_adapter']:.1%} to its adapter (mean over tasks); "
        f"{routing['abstained']} answered by the base alone",
        f"a prompt takes {took['features']:.1f} ms to read and {took['routing']:.3f} ms to route: "
        f"{routing['dot_products']:.0f} dot products, {exact}",
    ]
    if "agreement" in routing:
        lines.append(f"the search finds the nearest task of {routing['agreement']:.1%}")
    return lines


def _history(result: RouteResult) -> list[str]:
    """OP and BWT, where all tasks were asked after every task."""
    from treelora_cli.report import metrics

    routing = result.routing
    R = metrics.matrix_from_scores(result.cells, routing["learned"], routing["adapter"])
    op, bwt = metrics.op(R), metrics.bwt(R)
    if op is None:
        return []
    numbers = f"OP {100 * op:.2f}" + (f", BWT {100 * bwt:.2f}" if bwt is not None else "")
    return [f"{numbers} under {routing['adapter']}, scores x 100"]
