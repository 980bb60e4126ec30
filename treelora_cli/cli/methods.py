"""`treelora methods`: what there is, what each needs, and where it departs from its paper."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from treelora_cli.cli.output import print_json, stdout

if TYPE_CHECKING:
    from treelora_cli.methods.base import Method

Json = dict[str, Any]


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Tell of this method alone, in full.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the methods of train-stream, or tell what one does and where it departs from its paper.

    [bold]treelora methods treelora-official[/bold]
    """
    from treelora_cli.methods import registry

    found = registry()
    if name is not None:
        document = _describe(found.get(name))
        if as_json:
            print_json(document)
        else:
            _print_one(document)
        return
    listed = [_describe(found.get(known)) for known in found.names()]
    if as_json:
        print_json({"methods": listed})
    else:
        _print_list(listed)


def _describe(kind: type[Method]) -> Json:
    """Return what the code itself says of a method: docstrings, settings, departures."""
    about = inspect.getdoc(sys.modules[kind.__module__]) or ""
    return {
        "name": kind.name,
        "summary": (inspect.getdoc(kind) or "").split("\n")[0],
        "mode": kind.mode,
        "needs": sorted(kind(kind.Settings()).needs),
        "about": about,
        "settings": _settings(kind),
        "departures": [departure._asdict() for departure in kind.departures],
    }


def _settings(kind: type[Method]) -> list[Json]:
    return [
        {
            "key": field.alias or name,
            "default": field.get_default(call_default_factory=True),
            "values": [value for value in get_args(field.annotation) if isinstance(value, str)],
            "meaning": field.description or "",
        }
        for name, field in kind.Settings.model_fields.items()
    ]


def _print_list(listed: list[Json]) -> None:
    rows = [
        [one["name"], one["summary"], one["mode"], ", ".join(one["needs"]) or "nothing"]
        for one in listed
    ]
    _print_table(["method", "what it is", "who answers", "needs of a step"], rows)


def _print_one(one: Json) -> None:
    console = stdout()
    console.print(one["name"], style="bold", markup=False)
    console.print(one["about"], markup=False, soft_wrap=True)
    needs = ", ".join(one["needs"]) or "nothing"
    console.print(f"\nWho answers: {one['mode']}. Needs of a step: {needs}.", markup=False)
    if one["settings"]:
        console.print("\nSettings (--set method.KEY=VALUE)", style="bold")
        rows = [
            [key["key"], str(key["default"]), ", ".join(key["values"]), key["meaning"]]
            for key in one["settings"]
        ]
        _print_table(["key", "default", "values", "meaning"], rows)
    if one["departures"]:
        console.print("\nPaper, released code and this program", style="bold")
        rows = [list(departure.values()) for departure in one["departures"]]
        _print_table(["what", "paper", "released code", "here"], rows, lines=True)


def _print_table(heads: list[str], rows: list[list[str]], *, lines: bool = False) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_lines=lines)
    for number, head in enumerate(heads):
        table.add_column(head, overflow="fold", no_wrap=number == 0 and not lines)
    for row in rows:
        table.add_row(*map(Text, row))
    stdout().print(table)
