"""Scoring predictions: every reading of a task's metric, each from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from treelora_cli.tasks.sari import sari, source_text
from treelora_cli.tasks.text import words
from treelora_cli.tasks.types import Row, Task

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Reading = Callable[[str, Row], float]
"""Scores one prediction for one row, 0 to 1."""

METRICS = ("accuracy", "rouge_l", "sari", "edit_similarity", "f1")


def score(task: Task, predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Score the answers a model gave.

    For accuracy tasks the readings are ``strict`` (the task's metric), ``prefix`` (the rule of
    the official TreeLoRA code) and ``normalized`` (the O-LoRA benchmark's exact match); for
    text tasks ``rouge_l``, ``edit_similarity`` and ``f1``, and for simplification ``sari`` and
    ``sari_official``.

    Args:
        task: says the metric and, for accuracy, the reading.
        predictions: the generated answers, as decoded.
        rows: the rows they were generated for, in the same order.

    Returns:
        Means over the rows, 0 to 1, by reading; ``score`` is the task's own metric.

    Raises:
        ValueError: no rows, or not one prediction a row.
    """
    if len(predictions) != len(rows) or not rows:
        raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows")
    readings = _readings(task)
    means = {name: sum(map(read, predictions, rows)) / len(rows) for name, read in readings.items()}
    main = "strict" if task.metric == "accuracy" else task.metric
    return {"score": means[main], **means}


def score_rows(task: Task, predictions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Return the task's own metric for every row, 0 to 1, for lists of what went wrong."""
    main = "strict" if task.metric == "accuracy" else task.metric
    read = _readings(task)[main]
    return [read(prediction, row) for prediction, row in zip(predictions, rows, strict=True)]


def constant_score(task: Task, split: str) -> float | None:
    """Return what always giving the commonest training answer scores; None for text tasks.

    This is what reports call chance. Of equally common answers the first in alphabetical order
    is taken.

    Args:
        task: the task.
        split: the split to score on.
    """
    rows = task.splits.get(split, ())
    train = task.splits.get("train", ())
    if task.metric != "accuracy" or not rows or not train:
        return None
    first = task.reading == "first_letter"
    counts = Counter(row.answer.strip()[:1] if first else row.answer.strip() for row in train)
    commonest = min(counts, key=lambda answer: (-counts[answer], answer))
    return score(task, [commonest] * len(rows), rows)["score"]


def _readings(task: Task) -> dict[str, Reading]:
    if task.metric == "accuracy":
        if task.reading == "first_letter":
            return {
                "strict": _first_letter,
                "prefix": _prefix_letter,
                "normalized": _normalized_letter,
            }
        return {"strict": strict, "prefix": prefix, "normalized": normalized}
    readings: dict[str, Reading] = {
        "rouge_l": rouge_l,
        "edit_similarity": edit_similarity,
        "f1": token_f1,
    }
    if task.metric == "sari":
        readings |= {"sari": sari_of_paragraph, "sari_official": sari_of_prompt}
    if task.metric not in readings:
        raise ValueError(f"unknown metric {task.metric!r}; known: {', '.join(METRICS)}")
    return readings


def strict(prediction: str, row: Row) -> float:
    """Return 1 where prediction and answer are equal but for white space around them."""
    return float(prediction.strip() == row.answer.strip())


def prefix(prediction: str, row: Row) -> float:
    """Return 1 where the answer begins the prediction (the official TreeLoRA rule).

    White space around the prediction is taken off, then both are compared over the shorter of
    the two lengths: ``123`` counts for the answer ``12``, ``Actually`` for ``A``; a prediction
    shorter than the answer is wrong.
    """
    given = prediction.strip()
    return float(given[: min(len(given), len(row.answer))] == row.answer)


def normalized(prediction: str, row: Row) -> float:
    """Return 1 where both are equal in lower case, without ASCII punctuation, spaces collapsed."""
    return float(_normalize(prediction) == _normalize(row.answer))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalize(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _first_letter(prediction: str, row: Row) -> float:
    given = prediction.strip()[:1]
    return float(bool(given) and given == row.answer.strip()[:1])


def _prefix_letter(prediction: str, row: Row) -> float:
    """The official code cuts to the first character before it strips: `` B`` is wrong."""
    return prefix(prediction[:1], Row(row.prompt, row.answer[:1]))


def _normalized_letter(prediction: str, row: Row) -> float:
    given = _normalize(prediction)[:1]
    return float(bool(given) and given == _normalize(row.answer)[:1])


class _Words:
    """The tokenizer handed to rouge-score; its own drops every letter but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(prediction: str, row: Row) -> float:
    """Return the F1 of ROUGE-L: the longest common subsequence of words (see ``text.words``).

    An answer without any word, such as ``)`` in code, has to be met exactly.
    """
    if not words(row.answer):
        return strict(prediction, row)
    return float(_rouge().score(row.answer, prediction)["rougeL"].fmeasure)


_EMPTY_LITERAL = re.compile(r"<(NUM|STR|CHAR)_LIT>")
_LITERAL = re.compile(r"<(?:NUM|STR|CHAR)_LIT:(.*?)>", re.DOTALL)


def unmask_literals(code: str) -> str:
    """Put the literals of CodeXGLUE's masked code back: ``<STR_LIT:x>`` is ``x``.

    ``<NUM_LIT>`` without a value becomes ``0``, ``<STR_LIT>`` and ``<CHAR_LIT>`` become nothing.
    """
    bare = _EMPTY_LITERAL.sub(lambda match: "0" if match[1] == "NUM" else "", code)
    return _LITERAL.sub(r"\1", bare)


def edit_similarity(prediction: str, row: Row) -> float:
    """Return 1 - (insertions + deletions) / (both lengths), literals put back, ends stripped."""
    from rapidfuzz import fuzz

    given, wanted = unmask_literals(prediction).strip(), unmask_literals(row.answer).strip()
    return fuzz.ratio(given, wanted) / 100


def token_f1(prediction: str, row: Row) -> float:
    """Return the F1 of the words that prediction and answer share, counted with repetition.

    An answer without any word has to be met exactly.
    """
    given, wanted = Counter(words(prediction)), Counter(words(row.answer))
    if not wanted:
        return strict(prediction, row)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def sari_of_paragraph(prediction: str, row: Row) -> float:
    """Return SARI with the paragraph alone as the source, 0/0 counted as 0."""
    return sari(source_text(row.prompt), prediction, [row.answer])


def sari_of_prompt(prediction: str, row: Row) -> float:
    """Return SARI as the official code computes it: the whole prompt is the source, 0/0 is 1."""
    return sari(row.prompt, prediction, [row.answer], undefined=1.0)
