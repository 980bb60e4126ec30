"""`treelora prepare`: check task data, bring them into one form and record what they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.cli.output import stdout

if TYPE_CHECKING:
    from rich.table import Table

    from treelora_cli.tasks.layouts import Found
    from treelora_cli.tasks.source import Loaded
    from treelora_cli.tasks.store import Stored


def prepare(
    source: Annotated[Path, typer.Option(help="Folder that holds the tasks.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write; it then holds these tasks and no others.", show_default=False
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names, separated by commas (default: all found).", show_default=False
        ),
    ] = None,
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
    labels.json), plain JSON or JSON lines (TASK.jsonl, or TASK/train.jsonl
    and so on), and folders that this command wrote. Every row is checked;
    bad ones are named with file and line, up to ten.

    Written are OUT/TASK/train.jsonl, eval.jsonl and test.jsonl, and
    OUT/prepared.json with rows, SHA-256, labels, metric and fingerprint of
    each task. The same data give the same bytes. A folder prepared before
    is replaced as a whole; any other folder with files in it is refused.

    [bold]treelora prepare --source TRACE --out data --tasks FOMC,Py150[/bold]
    """
    from treelora_cli.tasks.inspect import token_counter, token_lengths
    from treelora_cli.tasks.layouts import detect
    from treelora_cli.tasks.load import load_found
    from treelora_cli.tasks.store import check_out, store

    check_out(out, source)
    found = detect(source)
    loaded = load_found(found, _names(tasks) or list(found.tasks))
    lengths = None
    if model is not None:
        count = token_counter(model)
        lengths = {one.task.name: token_lengths(one.task, count) for one in loaded}
    stored = store(loaded, out, source, model, lengths)
    _show(found, loaded, stored, out, as_json)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _show(found: Found, loaded: list[Loaded], stored: Stored, out: Path, as_json: bool) -> None:
    from treelora_cli.cli.output import print_json, stderr
    from treelora_cli.tasks.inspect import leaks

    warnings = [*_duplicate_warnings(stored.entries), *leaks([one.task for one in loaded])]
    notes = [note for one in loaded for note in one.notes]
    if as_json:
        document: dict[str, Any] = {
            "kind": "prepared",
            "out": str(out),
            "status": stored.status,
            "changes": list(stored.changes),
            "tasks": [{"name": name, **entry} for name, entry in stored.entries.items()],
            "ignored": found.ignored,
            "notes": notes,
            "warnings": warnings,
        }
        print_json(document)
        return
    say = stderr()
    for one in loaded:
        say.print(f"{one.task.name}: {_story(one)}", markup=False)
    for name, reason in found.ignored.items():
        say.print(f"passed over {name}: {reason}", markup=False)
    for note in notes:
        say.print(f"note: {note}", markup=False)
    for warning in warnings:
        say.print(f"warning: {warning}", markup=False)
    stdout().print(_overview(stored.entries))
    if any("tokens" in entry for entry in stored.entries.values()):
        stdout().print(_token_table(stored.entries))
    changes = f" ({', '.join(stored.changes)})" if stored.changes else ""
    say.print(f"{stored.status} {out}{changes}", markup=False)


def _story(one: Loaded) -> str:
    labels = one.task.labels
    closed = f"; labels {', '.join(labels)}" if labels is not None else ""
    return f"{one.layout} layout; {one.mapped}{closed}"


def _new_table(left: int, *titles: str) -> Table:
    """Return a table whose first ``left`` columns are text and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, title in enumerate(titles):
        table.add_column(title, no_wrap=True, justify="left" if at < left else "right")
    return table


def _overview(entries: dict[str, dict[str, Any]]) -> Table:
    titles = ("task", "layout", "metric", "lang", "labels", "train", "eval", "test", "repeated")
    table = _new_table(5, *titles)
    for name, entry in entries.items():
        labels = "open" if entry["labels"] is None else str(len(entry["labels"]))
        rows = [str(part["rows"]) for part in entry["files"].values()]
        table.add_row(
            name,
            entry["layout"],
            entry["metric"],
            entry["language"],
            labels,
            *rows,
            _repeated(entry["duplicates"]),
        )
    return table


def _repeated(counts: dict[str, int]) -> str:
    """Say how many rows repeat a prompt of their own split, and of an earlier one."""
    within = sum(count for name, count in counts.items() if "_in_" not in name)
    between = sum(count for name, count in counts.items() if "_in_" in name)
    return f"{within} + {between}" if within or between else "0"


def _token_table(entries: dict[str, dict[str, Any]]) -> Table:
    ranks = ("p50", "p90", "p99", "max")
    titles = [f"{part} {rank}" for part in ("prompt", "answer") for rank in ranks]
    table = _new_table(1, "tokens", *titles)
    for name, entry in entries.items():
        found = [entry["tokens"][part][rank] for part in ("prompt", "answer") for rank in ranks]
        table.add_row(name, *map(str, found))
    return table


def _duplicate_warnings(entries: dict[str, dict[str, Any]]) -> list[str]:
    """Put the counts of repeated prompts into words."""
    warnings: list[str] = []
    for name, entry in entries.items():
        for what, count in entry["duplicates"].items():
            if not count:
                continue
            split, _, other = what.partition("_in_")
            again = f"are also in {other}" if other else "repeat an earlier one of the split"
            warnings.append(f"{name}: {count} {split} prompts {again}")
    return warnings
