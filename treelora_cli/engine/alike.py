"""Processes that are to work together must be about the same thing; see to it before they begin."""

from __future__ import annotations

from collections.abc import Sequence

from treelora_cli.engine.world import World
from treelora_cli.errors import UsageError
from treelora_cli.models.backbone import Backbone
from treelora_cli.recipe import Recipe
from treelora_cli.tasks.types import Task


def check_same_recipe(recipe: Recipe, world: World) -> None:
    """Check that all processes were given the same settings.

    Raises:
        UsageError: one was given others; the first line of the recipe that differs is named.
    """
    found = [text.splitlines() for text in world.gather(recipe.to_yaml())]
    for rank, lines in enumerate(found):
        if lines != found[0]:
            more = max(len(lines), len(found[0]))
            pairs = zip(_filled(found[0], more), _filled(lines, more), strict=True)
            first, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise UsageError(
                f"process {rank} has other settings than process 0: {other.strip() or 'nothing'!r} "
                f"for {first.strip() or 'nothing'!r}",
                "start all of them with the same command",
            )


def check_same_inputs(tasks: Sequence[Task], backbone: Backbone, world: World) -> None:
    """Check that all processes read the same rows and the same base, perhaps from disks apart.

    Raises:
        UsageError: one reads others.
    """
    own = {f"the rows of task {task.name}": task.fingerprint for task in tasks}
    found = world.gather(own | {"the weights of the base": backbone.fingerprint})
    for rank, theirs in enumerate(found):
        odd = next((what for what, mark in theirs.items() if found[0].get(what) != mark), None)
        if odd is not None:
            raise UsageError(
                f"process {rank} does not read what process 0 reads: {odd} differ",
                "put the same data and model on every machine",
            )


def _filled(lines: Sequence[str], count: int) -> list[str]:
    return [*lines, *[""] * (count - len(lines))]
