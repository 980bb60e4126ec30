"""`treelora train-stream`: parse, hand over to the engine, show what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from treelora_cli.cli.output import write_out


def train_stream(
    tasks: Annotated[
        str | None,
        typer.Option(help="Task names in order, separated by commas.", show_default=False),
    ] = None,
    run_dir: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("run"),
    method: Annotated[
        str | None, typer.Option(help="treelora, seqlora, per-task.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of a causal language model (default: the built-in tiny base).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of tasks, prepared or not (default: the built-in synthetic tasks).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe by name or file; see `treelora recipes`.", show_default=False),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over every task's rows.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides everything random.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="A quick look: so many train and evaluation rows a task; scores made with it "
            "never enter OP and BWT.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key, e.g. optim.lr=1e-4; may be repeated."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON event a line on stdout.")
    ] = False,
) -> None:
    """Train on a stream of tasks, one after the other, and score what was learned and kept.

    Give the same command again to go on after an interruption; name new tasks
    to extend a finished run. Without --model and --data the built-in synthetic
    tasks and tiny base are used. At the end the run directory's path is printed
    on stdout, for pipelines.

    [bold]treelora train-stream --tasks C-STANCE,FOMC,ScienceQA[/bold]
    """
    from treelora_cli.cli.progress import viewer
    from treelora_cli.engine.plan import resolve_recipe
    from treelora_cli.engine.stream import run_stream

    flags: dict[str, Any] = {
        "stream": {"tasks": _names(tasks), "seed": seed},
        "method": {"name": method},
        "model": {"name": model},
        "data": {"path": data},
        "optim": {"epochs": epochs},
        "limit": limit,
    }
    resolved = resolve_recipe(run_dir, recipe, settings or [], _given(flags))
    with viewer(as_json) as show:
        run_stream(resolved, run_dir, show)
    if not as_json:
        write_out(str(run_dir))


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the user did not say."""
    given: dict[str, Any] = {}
    for key, value in flags.items():
        kept = _given(value) if isinstance(value, dict) else value
        if kept is not None and kept != {}:
            given[key] = kept
    return given
