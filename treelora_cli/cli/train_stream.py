"""`treelora train-stream`: parse, hand over to the engine, show what happens."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.cli.launch import Processes, launched, rank, together
from treelora_cli.cli.names import arriving, names_from, split_names
from treelora_cli.cli.output import print_json_line, write_out
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.engine.memory import Group
    from treelora_cli.engine.world import World


def train_stream(
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names in order: A,B,C, or @FILE, or - for names on standard input.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("run"),
    method: Annotated[
        str | None, typer.Option(help="By name; see `treelora methods`.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of a language model, causal or an encoder-decoder such as T5 "
            "(default: the built-in tiny base).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of tasks (prepared or not), one data file, or hf:ORG/NAME (default: the "
            "built-in synthetic tasks).",
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
    methods: Annotated[
        str | None,
        typer.Option(
            help="Sweep: one run per method and seed, in sub-folders of --run-dir.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Sweep over these seeds, e.g. 1,2,3.", show_default=False)
    ] = None,
    nproc: Processes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, check everything, and stop.")
    ] = False,
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

    [bold]treelora train-stream --methods treelora,seqlora --seeds 1,2,3 --run-dir sweep[/bold]
    """
    flags: dict[str, Any] = {
        "stream": {"tasks": [] if tasks == "-" else names_from(tasks), "seed": seed},
        "method": {"name": method},
        "model": {"name": model},
        "data": {"path": data},
        "optim": {"epochs": epochs},
        "limit": limit,
    }
    asked = Asked(recipe, settings or [], _given(flags), tasks == "-", nproc, dry_run, as_json)
    _start(asked, run_dir, methods, seeds)


def _start(asked: Asked, run_dir: Path, methods: str | None, seeds: str | None) -> None:
    """Train in as many processes as were asked for, whoever starts them."""
    several = launched() or (asked.nproc or 1) > 1
    if asked.arriving and (methods or seeds or asked.dry_run or several):
        raise UsageError(
            "--tasks - cannot be combined with --methods, --seeds, --dry-run or several processes",
            "name the tasks, or put them into a file: --tasks @FILE",
        )
    if asked.dry_run:
        _all(asked, run_dir, methods, seeds, None)
    else:
        with together(asked.nproc) as world:
            _all(asked, run_dir, methods, seeds, world)
    if not (asked.as_json or asked.dry_run) and rank() == 0:
        write_out(str(run_dir))


def _all(
    asked: Asked, run_dir: Path, methods: str | None, seeds: str | None, world: World | None
) -> None:
    if methods is not None or seeds is not None:
        _sweep(asked, run_dir, methods, seeds, world)
    else:
        _run(asked, run_dir, {}, world)


@dataclass(frozen=True)
class Asked:
    """What the user asked for, whatever the run directory."""

    recipe: str | None
    settings: list[str]
    flags: dict[str, Any]
    arriving: bool
    nproc: int | None
    dry_run: bool
    as_json: bool


def _run(asked: Asked, path: Path, more: dict[str, Any], world: World | None) -> None:
    """Train one run, or show what it would do.

    Args:
        asked: what the user asked for.
        path: the run directory.
        more: flags that hold for this run alone.
        world: the processes that train; None: nothing is trained.
    """
    from treelora_cli.engine.plan import resolve_recipe
    from treelora_cli.recipe import merge

    flags = merge(deepcopy(asked.flags), more)
    resolved = resolve_recipe(path, asked.recipe, asked.settings, flags, arriving=asked.arriving)
    if world is None:
        from treelora_cli.cli.dryrun import print_plan
        from treelora_cli.engine.dryrun import plan_stream

        plan = plan_stream(resolved, path, _group(asked.nproc))
        if asked.as_json:
            print_json_line({"kind": "plan", "run_dir": str(path), **plan.to_dict()})
        else:
            print_plan(plan)
        return
    from treelora_cli.cli.progress import viewer
    from treelora_cli.engine.stream import run_stream

    with viewer(asked.as_json) as show:
        run_stream(resolved, path, show, arriving if asked.arriving else None, world)


def _group(nproc: int | None) -> Group | None:
    """Return the processes that `--nproc` would start; None where it was not given."""
    from treelora_cli.engine.memory import Group

    return None if nproc is None else Group(nproc, nproc)


def _sweep(
    asked: Asked, parent: Path, methods: str | None, seeds: str | None, world: World | None
) -> None:
    """One run per method and seed; runs that are finished are passed over."""
    from treelora_cli.engine.sweep import note_sweep, plan_sweep

    method = asked.flags.get("method", {}).get("name", "treelora")
    seed = asked.flags.get("stream", {}).get("seed", 1234)
    names = [method] if methods is None else split_names(methods)
    numbers = [seed] if seeds is None else [_seed(text) for text in split_names(seeds)]
    runs = plan_sweep(parent, names, numbers)
    if world is not None and world.first:
        note_sweep(parent, runs)
    for run in runs:
        more = {"method": {"name": run.method}, "stream": {"seed": run.seed}}
        _run(asked, run.path, more, world)


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--seeds: {text!r} is not a whole number", "e.g. --seeds 1,2,3") from None


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the user did not say."""
    given: dict[str, Any] = {}
    for key, value in flags.items():
        kept = _given(value) if isinstance(value, dict) else value
        if kept is not None and kept != {}:
            given[key] = kept
    return given
