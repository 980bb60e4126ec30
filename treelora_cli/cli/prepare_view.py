"""What `treelora prepare` says: JSON for machines, tables and sentences for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.cli.output import print_json, stderr, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from treelora_cli.tasks.layouts import Found
    from treelora_cli.tasks.source import Loaded
    from treelora_cli.tasks.store import Stored

Entries = dict[str, dict[str, Any]]


def show(found: Found, loaded: Sequence[Loaded], stored: Stored, out: Path, as_json: bool) -> None:
    """Say what was found, guessed, left out and written.

    Args:
        found: what the sources held.
        loaded: the tasks that were read.
        stored: what became of the output folder.
        out: the output folder.
        as_json: one document on stdout, nothing else.
    """
    from treelora_cli.tasks.inspect import shared_prompts

    shared = shared_prompts([one.task for one in loaded])
    warnings = [*_left_out(stored.entries), *_repeats(stored.entries), *map(str, shared)]
    notes = [note for one in loaded for note in one.notes]
    if as_json:
        document: dict[str, Any] = {
            "kind": "prepared",
            "out": str(out),
            "status": stored.status,
            "changes": list(stored.changes),
            "tasks": [{"name": name, **entry} for name, entry in stored.entries.items()],
            "shared_prompts": [asdict(entry) for entry in shared],
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


def _overview(entries: Entries) -> Table:
    titles = ("task", "layout", "metric", "lang", "labels", "train", "eval", "test")
    table = _new_table(5, *titles, "repeated", "left out")
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
            str(sum(entry["bad_rows"].values())),
        )
    return table


def _repeated(counts: dict[str, int]) -> str:
    """Say how many rows repeat a prompt of their own split, and of an earlier one."""
    within = sum(count for name, count in counts.items() if "_in_" not in name)
    between = sum(count for name, count in counts.items() if "_in_" in name)
    return f"{within} + {between}" if within or between else "0"


def _token_table(entries: Entries) -> Table:
    ranks = ("p50", "p90", "p99", "max")
    titles = [f"{part} {rank}" for part in ("prompt", "answer") for rank in ranks]
    table = _new_table(1, "tokens", *titles)
    for name, entry in entries.items():
        found = [entry["tokens"][part][rank] for part in ("prompt", "answer") for rank in ranks]
        table.add_row(name, *map(str, found))
    return table


def _left_out(entries: Entries) -> list[str]:
    """Put the counts of rows that were left out into words."""
    return [
        f"{name}: {sum(counts.values())} rows left out ("
        + ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        + ")"
        for name, entry in entries.items()
        if (counts := entry["bad_rows"])
    ]


def _repeats(entries: Entries) -> list[str]:
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
