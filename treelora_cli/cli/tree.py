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
FORMATS = ("text", "json", "dot", "mermaid", "svg")
DIFF_FORMATS = ("text", "json")


@app.callback()
def group() -> None:
    """Look at the gradient tree of a run."""


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    at: Annotated[
        str | None, typer.Option(metavar="TASK", help="The tree as it was after this task.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="What changed between the tree after task A and the one after B."
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="The tree over what the tasks' prompts look like, which routing goes by: after "
            "the gradient tree as text and in json, where dot, mermaid and svg draw one tree.",
        ),
    ] = False,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="text|json|dot|mermaid|svg",
            help="How to show it: dot is for Graphviz, svg a picture; with --diff text or json.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show which tasks the gradient tree holds together, and where it parts them.

    With --diff, + is a new task and ~ one that has moved: of the tasks in both
    trees, others than before share the smallest group that holds it with any.

    [bold]treelora tree show run --format svg > tree.svg[/bold]

    [bold]treelora tree show run --diff FOMC ScienceQA[/bold]

    [bold]treelora tree show run --features[/bold]
    """
    chosen = _format(format_, as_json, DIFF_FORMATS if diff else FORMATS)
    if at is not None and diff is not None:
        raise UsageError("--at and --diff exclude each other", "--diff names both trees: A and B")
    if features and diff is not None:
        raise UsageError(
            "--features cannot be compared with --diff", "--at shows it after any task"
        )
    from treelora_cli.rundir.layout import RunDir

    opened = RunDir.open(run)
    if features or (diff is None and _has_features_alone(opened)):
        _show_features(opened, at, chosen)
    elif diff is not None:
        _show_diff(opened, diff, chosen)
    else:
        _show(opened, _document(opened, at), chosen)


def _format(wanted: str | None, as_json: bool, known: tuple[str, ...]) -> str:
    """Return the format asked for.

    Raises:
        UsageError: it is unknown, cannot show what is asked for, or two are asked for.
    """
    if as_json and wanted not in (None, "json"):
        raise UsageError(f"--json and --format {wanted} ask for two formats", "give one of them")
    chosen = "json" if as_json else wanted or "text"
    if chosen not in FORMATS:
        raise UsageError(f"unknown format {chosen!r}", did_you_mean(chosen, list(FORMATS)))
    if chosen not in known:
        raise UsageError(
            f"--diff cannot be shown as {chosen}", f"--format {' or '.join(known)}; --at draws one"
        )
    return chosen


def _has_features_alone(run: RunDir) -> bool:
    """Tell whether a run sends prompts to tasks, which takes a tree, and makes no other one."""
    return run.info.extra.get("mode") == "route" and not run.tree_json.exists()


def _show(run: RunDir, document: dict[str, Any], chosen: str) -> None:
    from treelora_cli.report.treedoc import caption, facts

    if chosen == "json":
        output.print_json(document)
        return
    if chosen == "text":
        _print_tree(caption(run.info, document), document)
        return
    if chosen == "svg":
        from treelora_cli.report.dendrogram import standalone as write
    elif chosen == "dot":
        from treelora_cli.report.treegraph import dot as write
    else:
        from treelora_cli.report.treegraph import mermaid as write
    output.write_out(write(document, facts(run.info, document)).removesuffix("\n"))


def _show_features(run: RunDir, at: str | None, chosen: str) -> None:
    """Show the tree over the tasks' prompts, after the gradient tree where both can be shown."""
    from treelora_cli.engine.routes import feature_tree

    if at is not None:
        _index([str(entry["name"]) for entry in run.info.tasks], at, "--at")
    document = feature_tree(run, at)
    # Not every method makes a gradient tree.
    gradient = _document(run, at) if run.tree_json.exists() else None
    if chosen == "json":
        output.print_json({**(gradient or {}), "features": document})
        return
    if chosen == "text" and gradient is not None:
        _show(run, gradient, chosen)
        output.stdout().print()
    _show(run, document, chosen)


def _show_diff(run: RunDir, tasks: tuple[str, str], chosen: str) -> None:
    from treelora_cli.report.treediff import compare, marks, summary, to_json
    from treelora_cli.report.treedoc import caption

    names = [str(entry["name"]) for entry in run.info.tasks]
    for task in tasks:
        _index(names, task, "--diff")
    first, second = tasks
    if names.index(first) > names.index(second):
        raise UsageError(
            f"--diff {first} {second}: {first} was learned later", f"--diff {second} {first}"
        )
    before, after = _document(run, first, "--diff"), _document(run, second, "--diff")
    diff = compare(before, after)
    if chosen == "json":
        output.print_json({"from": first, "to": second, **to_json(diff, before, after)})
        return
    _print_tree(f"{caption(run.info, after)}, compared with after {first}", after, marks(diff))
    console = output.stdout()
    console.print()
    for line in summary(diff):
        console.print(line, markup=False, soft_wrap=True)


def _print_tree(title: str, document: dict[str, Any], notes: dict[str, str] | None = None) -> None:
    from treelora_cli.tree.render import render

    console = output.stdout()
    console.print(title, style="dim", markup=False, soft_wrap=True)
    console.print(render(document, notes), soft_wrap=True)


def _index(names: list[str], task: str, option: str) -> int:
    if task not in names:
        raise UsageError(f"{option} {task}: the run has no such task", did_you_mean(task, names))
    return names.index(task)


def _document(run: RunDir, at: str | None, option: str = "--at") -> dict[str, Any]:
    """Read the tree document of a run, the current one or the one after a task.

    Raises:
        UsageError: the stream has no task of that name.
        RunDirError: no run directory, one without a tree, or none that far.
    """
    from treelora_cli.report.treedoc import read_tree

    where = run.tree_json
    if at is not None:
        index = _index([str(entry["name"]) for entry in run.info.tasks], at, option)
        where = run.tree_history(index, at) / "tree.json"
    document = read_tree(where)
    if document is not None:
        return document
    if at is not None and run.tree_json.exists():
        raise RunDirError(
            f"{run.path} holds no tree after {at}: the task is not finished",
            f"run `treelora tree show` without {option} for the tree as it is now",
        )
    raise RunDirError(
        f"{run.path} holds no gradient tree",
        f"no task is finished yet, or method {run.info.method} makes no tree",
    )
