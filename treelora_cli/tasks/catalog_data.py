"""The table of known tasks: the 24 names of the TreeLoRA benchmark.

Eight tasks of TRACE, fifteen of the O-LoRA benchmark, and Lima, which TRACE's replay mixes in.
Default epochs are TreeLoRA's own: on TRACE those of its paper, for the O-LoRA benchmark those of
its released scripts (one each).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """How a task is scored and decoded.

    Attributes:
        metric: ``accuracy``, ``rouge_l``, ``sari``, ``edit_similarity``, ``f1``; ``none`` for data
            that are only replayed.
        language: ``en``, ``de``, ``zh``, ``code`` or ``und``.
        max_answer_tokens: the most tokens generated for one answer.
        labels: the closed answer set in the benchmark's order, or None.
        reading: ``whole`` or ``first_letter``; see ``treelora_cli.tasks.types.Task``.
        benchmark: where the task comes from: ``TRACE``, ``O-LoRA`` or empty.
        separator: the text between prompt and answer. TRACE's prompts hold their instruction and
            run into the answer; those of the O-LoRA benchmark are put together from instruction,
            options and sentence and end in ``Answer:``.
        epochs: the default epochs of a recipe; None where neither paper nor scripts state any.
        replay_only: True for data that have no score and can be no task of a stream.
    """

    metric: str
    language: str
    max_answer_tokens: int
    labels: tuple[str, ...] | None = None
    reading: str = "whole"
    benchmark: str = ""
    separator: str = ""
    epochs: int | None = None
    replay_only: bool = False


_CLOSED_TOKENS = 16
_LETTERS = ("A", "B", "C")
_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_TRUE_FALSE = ("True", "False")
_FALSE_TRUE = ("False", "True")
_GOOD_BAD = ("Good", "Bad")


def _trace(
    metric: str,
    language: str,
    tokens: int,
    epochs: int,
    labels: tuple[str, ...] | None = None,
    reading: str = "whole",
) -> TaskInfo:
    return TaskInfo(metric, language, tokens, labels, reading, "TRACE", epochs=epochs)


def _closed(*labels: str) -> TaskInfo:
    return TaskInfo("accuracy", "en", _CLOSED_TOKENS, labels, "whole", "O-LoRA", " ", epochs=1)


KNOWN: dict[str, TaskInfo] = {
    "C-STANCE": _trace("accuracy", "zh", _CLOSED_TOKENS, 2, _LETTERS),
    "FOMC": _trace("accuracy", "en", _CLOSED_TOKENS, 1, _LETTERS),
    "MeetingBank": _trace("rouge_l", "en", 320, 3),
    "Py150": _trace("edit_similarity", "code", 128, 2),
    # Only the letter is read, so the explanation after it need not be generated.
    "ScienceQA": _trace("accuracy", "en", _CLOSED_TOKENS, 1, None, "first_letter"),
    "NumGLUE-cm": _trace("accuracy", "en", _CLOSED_TOKENS, 2),
    "NumGLUE-ds": _trace("accuracy", "en", _CLOSED_TOKENS, 2),
    "20Minuten": _trace("sari", "de", 320, 3),
    # 1 000 instructions with long answers, mixed into TRACE's replay.
    "Lima": TaskInfo("none", "en", 512, benchmark="TRACE", replay_only=True),
    "dbpedia": _closed(
        "Company",
        "Educational Institution",
        "Artist",
        "Athlete",
        "Office Holder",
        "Mean of Transportation",
        "Building",
        "Natural Place",
        "Village",
        "Animal",
        "Plant",
        "Album",
        "Film",
        "Written Work",
    ),
    "amazon": _closed(*_STARS),
    "yahoo": _closed(
        "Society & Culture",
        "Science & Mathematics",
        "Health",
        "Education & Reference",
        "Computers & Internet",
        "Sports",
        "Business & Finance",
        "Entertainment & Music",
        "Family & Relationships",
        "Politics & Government",
    ),
    "agnews": _closed("World", "Sports", "Business", "Science or Technology"),
    "yelp": _closed(*_STARS),
    "MNLI": _closed("neutral", "entailment", "contradiction"),
    "CB": _closed("entailment", "contradiction", "neutral"),
    "WiC": _closed(*_TRUE_FALSE),
    "COPA": _closed("A", "B"),
    "QQP": _closed(*_FALSE_TRUE),
    "BoolQA": _closed(*_TRUE_FALSE),
    "RTE": _closed("contradiction", "entailment"),
    "IMDB": _closed(*_GOOD_BAD),
    "SST-2": _closed(*_GOOD_BAD),
    "MultiRC": _closed(*_FALSE_TRUE),
}
"""Task name to how it is scored."""
