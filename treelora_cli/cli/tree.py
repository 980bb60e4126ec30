"""``treelora tree``: the gradient tree of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.cli import output
from treelora_cli.errors import RunDirError, UsageError, did_you_mean

if TYPE_CHECKING:
    from treelora_cli.rundir.layout import RunDir

app = typer.Typer(help="Look at the gradient tree of a run.", no_args_is_help=True)
FORMATS = ("text", "json")


@app.callback()
def group() -> None:
    """Look at the gradient tree of a run."""


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    at: Annotated[
        str | None, typer.Option(metavar="TASK", help="The tree as it was after this task.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="text|json", help="How to show it.")
    ] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show which tasks the gradient tree holds together, and where it parts them."""
    if format_ not in FORMATS:
        raise UsageError(f"unknown format {format_!r}", did_you_mean(format_, list(FORMATS)))
    from treelora_cli.rundir.layout import RunDir

    opened = RunDir.open(run)
    document = _document(opened, at)
    if as_json or format_ == "json":
        output.print_json(document)
        return
    from treelora_cli.report.treedoc import caption
    from treelora_cli.tree.render import render

    console = output.stdout()
    console.print(caption(opened.info, document), style="dim", markup=False, soft_wrap=True)
    console.print(render(document), soft_wrap=True)


def _document(run: RunDir, at: str | None) -> dict[str, Any]:
    """Read the tree document of a run, the current one or the one after a task.

    Raises:
        UsageError: the stream has no task of that name.
        RunDirError: no run directory, one without a tree, or none that far.
    """
    from treelora_cli.report.treedoc import read_tree

    names = [str(entry["name"]) for entry in run.info.tasks]
    if at is not None and at not in names:
        raise UsageError(f"--at {at}: the run has no such task", did_you_mean(at, names))
    where = run.tree_json
    if at is not None:
        where = run.tree_history(names.index(at), at) / "tree.json"
    document = read_tree(where)
    if document is not None:
        return document
    if at is not None and run.tree_json.exists():
        raise RunDirError(
            f"{run.path} holds no tree after {at}: the task is not finished",
            "run `treelora tree show` without --at for the tree as it is now",
        )
    raise RunDirError(
        f"{run.path} holds no gradient tree",
        f"method {run.info.method} makes none, or its first task is not finished yet",
    )
