"""Draws the rows of a miniature task into splits that share no text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from treelora_cli.errors import UsageError
from treelora_cli.tasks.types import SPLITS, Row

Draw = Callable[[random.Random, str], tuple[str, str]]
"""Maps a random stream and a split name to an input text and its answer."""

_SHARES = {"train": range(0, 5), "eval": range(5, 6), "test": range(6, 8)}
_PATIENCE = 5000


@dataclass(frozen=True, slots=True)
class Miniature:
    """The recipe of one task.

    Attributes:
        name: the task's name in TRACE.
        metric: one of the metrics of ``treelora_cli.tasks.types``.
        language: ``en``, ``de``, ``zh`` or ``code``.
        max_answer_tokens: the most tokens one answer may need.
        draw: makes one input text and its answer.
        frame: the prompt with ``{text}`` where the input text stands.
        labels: the closed answer set, or None.
        separator: text between prompt and answer.
    """

    name: str
    metric: str
    language: str
    max_answer_tokens: int
    draw: Draw
    frame: str
    labels: tuple[str, ...] | None = None
    separator: str = " "


def stream(*parts: object) -> random.Random:
    """Return a random stream that depends on the given parts alone, on every platform."""
    text = "\x1f".join(str(part) for part in parts)
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def inputs(recipe: Miniature, split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Draw ``count`` different input texts of one split, with their answers.

    A text belongs to the split that its own hash names. So two splits cannot share one, and a
    split's first rows stay the same when it, or another, is drawn longer. A task with labels has
    each of them once in every block of as many rows.

    Raises:
        UsageError: the task has fewer different texts than asked for.
    """
    rng = stream(recipe.name, split, seed)
    rows: dict[str, str] = {}
    block: set[str] = set()
    misses = 0
    while len(rows) < count:
        text, answer = recipe.draw(rng, split)
        digest = hashlib.sha256(f"{recipe.name}\x1f{text}".encode()).digest()
        if digest[0] % 8 not in _SHARES[split] or text in rows or answer in block:
            misses += 1
            if misses > _PATIENCE:
                raise UsageError(
                    f"built-in task {recipe.name}: only {len(rows)} different {split} rows exist, "
                    f"{count} were asked for",
                    "ask for fewer rows, or bring data of your own with --data",
                )
            continue
        misses = 0
        rows[text] = answer
        if recipe.labels:
            block.add(answer)
            if len(block) == len(recipe.labels):
                block.clear()
    return list(rows.items())


def splits(recipe: Miniature, rows: dict[str, int], seed: int) -> dict[str, tuple[Row, ...]]:
    """Draw every split of a task as prompts and answers."""
    return {
        split: tuple(
            Row(recipe.frame.replace("{text}", text), answer)
            for text, answer in inputs(recipe, split, rows[split], seed)
        )
        for split in SPLITS
    }
