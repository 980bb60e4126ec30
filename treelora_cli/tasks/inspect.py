"""What a person wants to know of a task before training: duplicates and lengths in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import DataError
from treelora_cli.tasks.types import SPLITS, Row, Task

_BATCH = 512

TokenCounter = Callable[[Sequence[str]], list[int]]
"""Gives the number of tokens of each text."""


def duplicates(task: Task) -> dict[str, int]:
    """Count rows whose prompt occurs before: within each split, and in an earlier split.

    Prompts are compared in lower case with white space collapsed.

    Returns:
        Rows by ``train``, ``eval``, ``test`` (repeated within) and ``eval_in_train``,
        ``test_in_train``, ``test_in_eval`` (also in that other split).
    """
    keys = {split: prompt_keys(task.splits.get(split, ())) for split in SPLITS}
    sets = {split: set(found) for split, found in keys.items()}
    counts = {split: len(keys[split]) - len(sets[split]) for split in SPLITS}
    for later, earlier in (("eval", "train"), ("test", "train"), ("test", "eval")):
        counts[f"{later}_in_{earlier}"] = sum(key in sets[earlier] for key in keys[later])
    return counts


def prompt_keys(rows: Iterable[Row]) -> list[str]:
    """Return the prompts as they are compared: lower case, white space collapsed."""
    return [" ".join(row.prompt.lower().split()) for row in rows]


@dataclass(frozen=True, slots=True)
class Shared:
    """Prompts that two tasks have in common.

    Attributes:
        task: one task.
        split: its split.
        other: the other task.
        other_split: its split.
        rows: rows of the first whose prompt is among those of the second.
    """

    task: str
    split: str
    other: str
    other_split: str
    rows: int

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.rows} {self.split} prompts of {self.task} are in the {self.other_split} rows "
            f"of {self.other}"
        )


def shared_prompts(tasks: Sequence[Task]) -> list[Shared]:
    """Find evaluation prompts that another task trains on, and training prompts in two tasks.

    Args:
        tasks: in the order of the stream; the later of two tasks is named first where both train
            on the same prompts.
    """
    keys = {
        (task.name, split): prompt_keys(task.splits.get(split, ()))
        for task in tasks
        for split in SPLITS
    }
    trained = {task.name: set(keys[task.name, "train"]) for task in tasks}
    found: list[Shared] = []
    for at, task in enumerate(tasks):
        for before, other in enumerate(tasks):
            splits = ["test", "eval", *(["train"] if before < at else [])]
            for split in splits if before != at else []:
                rows = sum(key in trained[other.name] for key in keys[task.name, split])
                if rows:
                    found.append(Shared(task.name, split, other.name, "train", rows))
    return found


def token_lengths(task: Task, count: TokenCounter) -> dict[str, dict[str, int]]:
    """Return p50, p90, p99 and max of the tokens of prompts and of answers, over all splits.

    Percentiles are by nearest rank, so each is the length of an actual row.

    Args:
        task: the task.
        count: gives the tokens of each text, without special tokens.
    """
    rows = [row for split in SPLITS for row in task.splits.get(split, ())]
    texts = {"prompt": [row.prompt for row in rows], "answer": [row.answer for row in rows]}
    return {name: _percentiles(count(found)) for name, found in texts.items()}


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    ranks = {f"p{percent}": -(-len(ordered) * percent // 100) for percent in (50, 90, 99)}
    return {name: ordered[rank - 1] for name, rank in ranks.items()} | {"max": ordered[-1]}


def token_counter(model: str) -> TokenCounter:
    """Return a counter of tokens by a model's tokenizer; code of the model's own is never run.

    Args:
        model: a Hub id or a folder.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    hint = "give a Hub id or a folder that holds a tokenizer"
    path = Path(model)
    if not path.is_dir() and (path.exists() or path.is_absolute() or model.startswith(".")):
        raise DataError(f"--model {model}: no such folder", hint)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        # transformers lets errors of many libraries through: OSError, ValueError, KeyError, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"no tokenizer could be loaded from {model}: {reason}", hint) from error

    def count(texts: Sequence[str]) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            found = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            lengths.extend(len(ids) for ids in found)
        return lengths

    return count
