"""What is known of a task by its name, and a reported guess for every other task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from treelora_cli.tasks.catalog_data import KNOWN, TaskInfo
from treelora_cli.tasks.types import SPLITS, Row

__all__ = ["KNOWN", "TaskInfo", "guess", "lookup", "resolve"]

_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?([eE][-+]?[0-9]+)?%?")
_MOST_LABELS = 50
_LONGEST_LABEL = 64


def lookup(name: str) -> TaskInfo | None:
    """Return the table's entry for a task name (case does not matter), or None."""
    folded = name.casefold()
    for known, info in KNOWN.items():
        if known.casefold() == folded:
            return info
    return None


def resolve(
    name: str,
    splits: Mapping[str, Sequence[Row]],
    labels: tuple[str, ...] | None = None,
) -> tuple[TaskInfo, list[str]]:
    """Say how a task is scored: from the table where the rows fit it, else by a guess.

    Args:
        name: the task's name.
        splits: its rows by split name.
        labels: the closed answer set if the data name one; it wins over the table's.

    Returns:
        The entry, and what a person should be told about it.
    """
    answers = [row.answer for split in SPLITS for row in splits.get(split, ())]
    info = lookup(name)
    if info is not None:
        allowed = labels or info.labels
        strangers = {answer for answer in answers if allowed and answer.strip() not in allowed}
        if not strangers:
            return _with_labels(info, labels), []
        note = (
            f"{name}: {len(strangers)} answers, such as {min(strangers)[:40]!r}, are not among "
            "the labels of the benchmark task of that name"
        )
        guessed, notes = guess(name, answers)
        return guessed, [note, *notes]
    if labels is not None:
        note = f"{name}: not a known task; accuracy, for the data name {len(labels)} labels"
        return TaskInfo("accuracy", "und", 16, labels), [note]
    return guess(name, answers)


def _with_labels(info: TaskInfo, labels: tuple[str, ...] | None) -> TaskInfo:
    if labels is None or labels == info.labels:
        return info
    return replace(info, labels=labels)


def guess(name: str, answers: Sequence[str]) -> tuple[TaskInfo, list[str]]:
    """Guess the metric from the answers: few short ones or numbers mean accuracy, else ROUGE-L.

    Args:
        name: the task's name, for the note.
        answers: every answer of every split.

    Returns:
        The entry, and one note that says what was guessed and why.
    """
    distinct = {answer.strip() for answer in answers}
    longest = max((len(answer) for answer in distinct), default=0)
    few = len(distinct) <= _MOST_LABELS and 2 * len(distinct) <= len(answers)
    if few and longest <= _LONGEST_LABEL:
        note = f"{name}: not a known task; accuracy guessed ({len(distinct)} distinct answers)"
        tokens = max(16, _round_up(longest))
        return TaskInfo("accuracy", "und", tokens, tuple(sorted(distinct))), [note]
    if all(_NUMBER.fullmatch(answer) for answer in distinct):
        note = f"{name}: not a known task; accuracy guessed (every answer is a number)"
        return TaskInfo("accuracy", "und", max(16, _round_up(longest))), [note]
    note = f"{name}: not a known task; rouge_l guessed (free text answers)"
    return TaskInfo("rouge_l", "und", min(512, max(16, _round_up(longest // 2)))), [note]


def _round_up(tokens: int) -> int:
    """Round up to a multiple of 16; a character is taken as at most one token."""
    return -(-tokens // 16) * 16
