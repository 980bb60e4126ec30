"""Show a planned stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.cli.output import stdout

if TYPE_CHECKING:
    from treelora_cli.engine.dryrun import Plan


def print_plan(plan: Plan) -> None:
    """Print tasks, steps and sizes as a table and three lines."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    titles = ("task", "status", "metric", "train", "test", "epochs", "steps", "tokens", "longest")
    for at, title in enumerate((*titles, "cut")):
        table.add_column(title, no_wrap=True, justify="left" if at < 3 else "right")
    for task in plan.tasks:
        counts = (task.rows, task.test_rows, task.epochs, task.steps, task.tokens, task.longest)
        numbers = [f"{count:,}" for count in (*counts, task.cut)]
        table.add_row(task.name, task.status, task.metric, *numbers)
    steps = sum(task.steps for task in plan.tasks if task.status != "finished")
    out = stdout()
    out.print(f"{plan.method} on {plan.model}, {plan.device}, {plan.dtype}", markup=False)
    out.print(table)
    out.print(
        f"{steps:,} optimizer steps, a base of {plan.parameters:,} parameters, "
        f"{plan.trainable_parameters:,} trainable parameters"
    )
    free = plan.memory_free_bytes
    out.print(
        f"memory: about {_size(plan.memory_bytes)} (weights, adapter, its gradients and Adam "
        f"moments, logits, {_size(plan.activation_bytes)} of activations)"
        + (f" in each of {plan.processes} processes" if plan.processes > 1 else "")
        + (f", {_size(free)} free" if free is not None else "")
        + (" for each" if free is not None and plan.processes > 1 else "")
    )
    out.print(f"disk: about {_size(plan.disk_bytes)}, {_size(plan.disk_free_bytes)} free")
    out.print("nothing was run: leave out --dry-run to begin")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
