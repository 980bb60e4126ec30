"""What a task is: rows, metric, labels and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("train", "eval", "test")

Metric = str
"""One of ``accuracy``, ``rouge_l``, ``sari``, ``edit_similarity``, ``f1``; ``none``: no score."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example: the whole prompt as the model reads it, and the answer it should give.

    A prompt of several turns is a :class:`treelora_cli.conversation.Conversation`: text as well.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A named data set with its splits and the way its answers are scored.

    Attributes:
        name: matches ``^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$``.
        metric: how a prediction is scored; see ``treelora_cli.tasks.metrics``.
        language: ``en``, ``de``, ``zh``, ``code``, or ``und`` where nobody said.
        max_answer_tokens: the most tokens generated for one answer.
        splits: rows by split name (``train``, ``eval``, ``test``).
        labels: the closed answer set, or None for open answers.
        reading: how an accuracy task's prediction is read: ``whole`` (the full answer) or
            ``first_letter`` (ScienceQA: the letter before the explanation).
        separator: text put between prompt and answer; the answer follows it directly.
        fingerprint: SHA-256 over name, metric, reading, separator and every row of every split.
        source: a short text for people: layout and file, or the generator and its seed.
        synthetic: True for data that was generated, not collected.
    """

    name: str
    metric: Metric
    language: str
    max_answer_tokens: int
    splits: dict[str, tuple[Row, ...]] = field(repr=False)
    fingerprint: str
    labels: tuple[str, ...] | None = None
    reading: str = "whole"
    separator: str = ""
    source: str = ""
    synthetic: bool = False
