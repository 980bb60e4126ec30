"""How long real rows are: counts that come along, or those of the user's own copy of the data."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.models.backbone import load_tokenizer
from treelora_cli.models.encode import Encoder
from treelora_cli.tasks.load import available, load_tasks

SHIPPED = Path(__file__).resolve().parent / "trace_lengths.json"
ROWS = 20
SEED = 0
PROMPT, ANSWER = 1024, 512
"""The papers' limits, in tokens; begin and end tokens come on top."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompt and answer of sampled rows.

    Attributes:
        about: where they come from.
        tasks: rows by task, each the tokens read and the tokens learned, begin and end included.
    """

    about: str
    tasks: dict[str, list[tuple[int, int]]]

    def take(self, rows: int) -> list[tuple[int, int]]:
        """Return the first rows of every task, task by task."""
        return [pair for pairs in self.tasks.values() for pair in pairs[:rows]]


def shipped() -> Lengths:
    """Return the lengths of TRACE's rows that come along."""
    document = json.loads(SHIPPED.read_text(encoding="utf-8"))
    tasks = {name: [(p, a) for p, a in pairs] for name, pairs in document["tasks"].items()}
    return Lengths(document["about"], tasks)


def count(data: Path, model: str, rows: int = ROWS, seed: int = SEED) -> Lengths:
    """Sample training rows of every task and count their tokens as training would read them.

    Args:
        data: a place of tasks, as ``train-stream --data`` takes.
        model: hub id or folder; its tokenizer counts.
        rows: rows a task.
        seed: decides which.

    Raises:
        DataError: no tasks, or rows that cannot be used.
    """
    encoder = Encoder(load_tokenizer(model, {}), PROMPT, ANSWER)
    found: dict[str, list[tuple[int, int]]] = {}
    for task in load_tasks(available(data), data):
        split = task.splits["train"]
        chosen = random.Random(f"{seed}:{task.name}").sample(split, min(rows, len(split)))
        examples = [encoder.example(row.prompt, row.answer, task.separator) for row in chosen]
        found[task.name] = [
            (example.answer_start, len(example.tokens) - example.answer_start)
            for example in examples
        ]
    about = (
        f"{rows} training rows a task, drawn with seed {seed}; at most {PROMPT} prompt and "
        f"{ANSWER} answer tokens of the given tokenizer"
    )
    return Lengths(about, found)


def to_json(lengths: Lengths) -> dict[str, Any]:
    """Return the content of the file that comes along."""
    return {
        "about": lengths.about,
        "tasks": {k: [list(p) for p in v] for k, v in lengths.tasks.items()},
    }


def lengths_for(data: Path | None, model: str | None) -> Lengths:
    """Return the user's own lengths, or those that come along.

    Args:
        data: a place of tasks, or None.
        model: the tokenizer's hub id or folder, given with ``data``.
    """
    return shipped() if data is None or model is None else count(data, model)
