"""`treelora recipes`: what comes along, and what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from treelora_cli.cli.output import print_json, stdout


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe instead of the list.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the recipes that come with treelora, or print one to copy and change.

    [bold]treelora recipes trace-small > mine.yaml[/bold], edit it, and give it to
    [bold]train-stream --recipe mine.yaml[/bold].
    """
    from treelora_cli.recipe import find_recipe, read_yaml, recipe_names

    if name is not None:
        text = find_recipe(name).read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "recipe": read_yaml(text, name)})
        else:
            stdout().out(text, end="", highlight=False)
        return
    listed = {known: _summary(find_recipe(known).read_text("utf-8")) for known in recipe_names()}
    if as_json:
        print_json({"recipes": [{"name": key, "summary": text} for key, text in listed.items()]})
        return
    width = max(map(len, listed), default=0)
    for known, text in listed.items():
        stdout().print(f"[bold]{known:<{width}}[/bold]  {text}", soft_wrap=True)


def _summary(text: str) -> str:
    """A recipe's first comment line says what it is for."""
    first = text.splitlines()[0] if text else ""
    return first.removeprefix("#").strip()
