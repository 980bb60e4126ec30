"""`treelora export`: adapters as plain PEFT folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.cli.output import print_json, write_out
from treelora_cli.errors import UsageError


def export(
    run: Annotated[Path, typer.Argument(help="The run directory.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            help="Where the folders are made, one a task, named after it.", show_default=False
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose adapter; may be repeated (default: the latest task's).", show_default=False
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every trained task's adapter.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a run's adapters as plain PEFT folders, in whatever form the run keeps them.

    Each folder loads with [bold]peft.PeftModel.from_pretrained(base, OUT/TASK)[/bold], with no
    treelora installed, and holds the same bytes whether the run stores it whole or as a
    difference. A merged adapter is written for each task that it answers for. Where a method
    trains more than LoRA, the folder also has weights.safetensors. Nothing is overwritten; the run
    is only read.

    [bold]treelora export run --task FOMC --out adapters[/bold]
    """
    from treelora_cli.engine.export import export_adapters

    if every and task:
        raise UsageError("--all and --task exclude each other", "give one of them")
    written = export_adapters(run, None if every else task or [], out)
    if as_json:
        adapters = [
            {"task": one.task, "path": str(one.path), "answers_for": list(one.members)}
            for one in written
        ]
        print_json({"run": str(run), "adapters": adapters})
        return
    for one in written:
        write_out(str(one.path))
