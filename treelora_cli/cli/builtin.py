"""`treelora builtin`: the tiny base and the miniature tasks that need no network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.cli.names import names_from
from treelora_cli.cli.output import print_json, stderr, stdout, write_out

app = typer.Typer(
    help="The built-in tiny base and miniature tasks (synthetic, no network needed).",
    no_args_is_help=True,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("path")
def path(json_output: JsonFlag = False) -> None:
    """Print the folder of the shipped base; it can be given to --model.

    [bold]treelora train-stream --recipe trace-small --tasks FOMC --data mini
    --model "$(treelora builtin path)"[/bold]
    """
    from treelora_cli.models.pretrain import shipped_base

    folder = shipped_base()
    if json_output:
        print_json({"kind": "builtin-path", "path": str(folder)})
    else:
        write_out(str(folder))


@app.command("export")
def export(
    out: Annotated[Path, typer.Option(help="Folder for the tasks; must be empty or new.")],
    tasks: Annotated[
        str, typer.Option(help="Task names with commas between them; all eight by default.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Names the rows; the built-in seed by default.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Write the miniature tasks as files in TRACE's layout (TASK/train.json and so on).

    [bold]treelora builtin export --out mini --tasks FOMC,ScienceQA[/bold]
    """
    from treelora_cli.tasks import miniature
    from treelora_cli.tasks.miniature.export import write_trace

    names = names_from(tasks) or list(miniature.NAMES)
    chosen = miniature.DEFAULT_SEED if seed is None else seed
    files = write_trace(out, [miniature.load(name, seed=chosen) for name in names])
    if json_output:
        listed = [str(file) for file in files]
        print_json({"kind": "builtin-export", "seed": chosen, "tasks": names, "files": listed})
    else:
        for file in files:
            write_out(str(file))


@app.command("pretrain")
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for the base; must be empty or new.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read; repeatable to the byte.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes to train; not repeatable to the byte.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Names the text and the first weights.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Pre-train a tiny base on generated text, the way the shipped one was made.

    [bold]treelora builtin pretrain --out base --tokens 6000000 --seed 7[/bold]
    """
    from dataclasses import replace

    from rich.progress import Progress

    from treelora_cli.models.pretrain import PretrainSettings, Reading, pretrain
    from treelora_cli.tasks.miniature.reading import DESCRIPTION, documents

    settings = PretrainSettings()
    if seed is not None:
        settings = replace(settings, seed=seed)
    if tokens is not None or minutes is not None:
        settings = replace(settings, tokens=tokens, minutes=minutes)
    with Progress(console=stderr(), transient=True) as bar:
        task = bar.add_task("pre-training", total=1.0)

        def told(done: float, loss: float, read: int) -> None:
            bar.update(task, completed=done, description=f"{read:,} tokens, loss {loss:.3f}")

        result = pretrain(out, Reading(documents, DESCRIPTION), settings, told)
    if json_output:
        print_json(
            {
                "kind": "builtin-pretrain",
                "path": str(result.out),
                "tokens": result.tokens_read,
                "steps": result.steps,
                "loss": result.loss,
                "parameters": result.parameters,
                "seconds": result.seconds,
            }
        )
    else:
        stdout().print(
            f"{result.out}: {result.parameters:,} parameters, {result.tokens_read:,} tokens, "
            f"loss {result.loss:.3f}",
            markup=False,
        )
