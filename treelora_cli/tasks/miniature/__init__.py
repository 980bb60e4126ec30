"""Miniature versions of the eight TRACE tasks, generated from a seed by this package alone.

They let every command run with no network and no data. They are synthetic: a score on them says
whether a method learns and forgets, not how good it is on the real task of that name.
"""

from __future__ import annotations

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.tasks.fingerprint import fingerprint
from treelora_cli.tasks.miniature import choice, numbers, writing
from treelora_cli.tasks.miniature.drawing import Miniature, splits
from treelora_cli.tasks.types import SPLITS, Task

RECIPES: tuple[Miniature, ...] = (
    choice.STANCE,
    choice.POLICY,
    writing.MEETING,
    writing.CODE,
    choice.SCIENCE,
    numbers.PARTS,
    numbers.STORIES,
    writing.GERMAN,
)
"""The recipes in TRACE's order."""

NAMES: tuple[str, ...] = tuple(recipe.name for recipe in RECIPES)
"""The eight task names in TRACE's order."""

DEFAULT_ROWS = {"train": 300, "eval": 50, "test": 100}
DEFAULT_SEED = 2026


def load(name: str, rows: dict[str, int] | None = None, seed: int = DEFAULT_SEED) -> Task:
    """Generate one miniature task.

    Args:
        name: one of ``NAMES``.
        rows: rows by split; a split that is not named keeps its default (300, 50, 100).
        seed: names the rows; the same seed gives the same rows on every machine.

    Raises:
        UsageError: unknown task or split, a negative number of rows, or more rows than exist.
    """
    by_name = {recipe.name: recipe for recipe in RECIPES}
    if name not in by_name:
        raise UsageError(f"unknown built-in task {name!r}", did_you_mean(name, list(NAMES)))
    counts = {**DEFAULT_ROWS, **(rows or {})}
    for split, count in counts.items():
        if split not in SPLITS or count < 0:
            raise UsageError(
                f"built-in task {name}: cannot make {count} rows of split {split!r}",
                f"splits are {', '.join(SPLITS)}; rows are 0 or more",
            )
    recipe = by_name[name]
    drawn = splits(recipe, counts, seed)
    return Task(
        name=recipe.name,
        metric=recipe.metric,
        language=recipe.language,
        max_answer_tokens=recipe.max_answer_tokens,
        splits=drawn,
        fingerprint=fingerprint(recipe.name, recipe.metric, "whole", drawn, recipe.separator),
        labels=recipe.labels,
        separator=recipe.separator,
        source=f"built-in, synthetic, seed {seed}",
        synthetic=True,
    )
