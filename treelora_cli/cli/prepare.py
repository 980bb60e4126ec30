"""`treelora prepare`: check task data, bring them into one form and record what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.errors import UsageError
from treelora_cli.tasks.problems import OnBadRow


def prepare(
    source: Annotated[
        list[str],
        typer.Option(
            help="Folder of tasks, one data file, or hf:ORG/NAME with @REVISION and :CONFIG if "
            "wanted; may be repeated.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write; it then holds these tasks and no others.", show_default=False
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names, separated by commas, or @FILE (default: all found).",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of tables: prompt=COL,answer=COL and input=COL if there is one, or "
            "messages=COL (default: found by their names).",
            show_default=False,
        ),
    ] = None,
    on_bad_row: Annotated[
        OnBadRow,
        typer.Option(
            help="error: refuse the data; skip: leave bad rows out and count them; quarantine: "
            "and keep them in OUT/quarantine/TASK.jsonl."
        ),
    ] = "error",
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder: measure the rows in tokens of its tokenizer.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check task data, bring them into one form and record what they are.

    Understood are TRACE folders (TASK/train.json, eval.json, test.json),
    the O-LoRA benchmark (GROUP/TASK/train.json, dev.json, test.json and
    labels.json), tables in JSON, JSON lines, CSV, TSV, Parquet or Arrow
    (TASK.csv, or TASK/train.csv and so on), what the datasets library
    loads (hf:ORG/NAME, hf:./FOLDER), and folders that this command wrote.
    Every row is checked; bad ones are named with file and line, up to ten.

    Written are OUT/TASK/train.jsonl, eval.jsonl and test.jsonl, and
    OUT/prepared.json with rows, SHA-256, labels, metric and fingerprint of
    each task. The same data give the same bytes. A folder prepared before
    is replaced as a whole; any other folder with files in it is refused.

    [bold]treelora prepare --source TRACE --out data --tasks FOMC,Py150[/bold]
    """
    from treelora_cli.cli.names import names_from
    from treelora_cli.cli.prepare_view import show
    from treelora_cli.tasks.columns import parse_columns
    from treelora_cli.tasks.inspect import token_counter, token_lengths
    from treelora_cli.tasks.layouts import detect_all
    from treelora_cli.tasks.load import load_found
    from treelora_cli.tasks.store import check_out, store

    check_out(out, source)
    found = detect_all(source, None if columns is None else parse_columns(columns))
    names = names_from(tasks) or list(found.tasks)
    fixed = [name for name in names if name in found.tasks and not found.tasks[name].columns]
    if columns is not None and fixed:
        raise UsageError(
            f"--columns does not apply to {', '.join(fixed)}: that layout has columns of its own",
            "choose tables with --tasks",
        )
    loaded = load_found(found, names, on_bad_row)
    lengths = None
    if model is not None:
        count = token_counter(model)
        lengths = {one.task.name: token_lengths(one.task, count) for one in loaded}
    stored = store(loaded, out, source, model, lengths, quarantine=on_bad_row == "quarantine")
    show(found, loaded, stored, out, as_json)
