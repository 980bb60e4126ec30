"""What a reader is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treelora_cli.tasks.catalog import resolve
from treelora_cli.tasks.columns import Columns
from treelora_cli.tasks.fingerprint import fingerprint
from treelora_cli.tasks.hub import DatasetId
from treelora_cli.tasks.problems import BadRow
from treelora_cli.tasks.types import Row, Task

TRACE = "trace"
CL_BENCHMARK = "cl_benchmark"
PLAIN = "plain"
DATASET = "dataset"
PREPARED = "prepared"

SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("eval", "dev", "valid", "validation", "val"),
    "test": ("test",),
}
"""What the splits are called in files and data sets, best name first."""

WHOLE = "all"
"""The key of ``TaskSource.files`` for one file that holds every row."""


@dataclass(frozen=True, slots=True)
class TaskSource:
    """One task found in a folder.

    Attributes:
        name: the task's name: its folder's, file's or data set's.
        layout: ``trace``, ``cl_benchmark``, ``plain``, ``dataset`` or ``prepared``.
        files: the file of each split, or one under ``all`` that is to be split.
        place: where it lies below the data folder, for people.
        columns: the columns the user named, or None.
        dataset: what the ``datasets`` library shall load, for that layout.
    """

    name: str
    layout: str
    files: Mapping[str, Path]
    place: str
    columns: Columns | None = None
    dataset: DatasetId | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A task with the story of how it was read.

    Attributes:
        task: the task.
        layout: as in ``TaskSource``.
        mapped: which columns became prompt and answer.
        notes: guesses and decisions that a person should know of.
        bad_rows: rows that were left out.
    """

    task: Task
    layout: str
    mapped: str
    notes: tuple[str, ...] = field(default=())
    bad_rows: tuple[BadRow, ...] = field(default=())


def build(
    source: TaskSource,
    splits: dict[str, tuple[Row, ...]],
    *,
    mapped: str,
    separator: str | None,
    labels: tuple[str, ...] | None = None,
    notes: Sequence[str] = (),
) -> Loaded:
    """Make a task of checked rows: metric, labels and reading come from the catalog or a guess.

    Args:
        source: where the rows came from.
        splits: the rows of train, eval and test.
        mapped: which columns became prompt and answer.
        separator: the text between prompt and answer; None: the catalog's, or else a guess.
        labels: the closed answer set, where the data name one.
        notes: what the reader has to say.
    """
    info, more = resolve(source.name, splits, labels)
    if separator is None and info.benchmark:
        separator = info.separator
    elif separator is None:
        separator, note = guess_separator([row.prompt for row in splits["train"]])
        more = [*more, f"{source.name}: {note}"]
    task = Task(
        name=source.name,
        metric=info.metric,
        language=info.language,
        max_answer_tokens=info.max_answer_tokens,
        splits=splits,
        fingerprint=fingerprint(source.name, info.metric, info.reading, splits, separator),
        labels=info.labels,
        reading=info.reading,
        separator=separator,
        source=f"{source.layout} layout, {source.place}",
    )
    return Loaded(task, source.layout, mapped, (*notes, *more))


def guess_separator(prompts: Sequence[str]) -> tuple[str, str]:
    """Return the text to put between prompt and answer, and a note that says why.

    Nothing where every prompt ends in white space or in a script written without spaces,
    one space otherwise.
    """
    if all(prompt[-1].isspace() or prompt[-1] >= "\u2e80" for prompt in prompts):
        return "", "no separator between prompt and answer: the prompts end in one"
    return " ", "one space put between prompt and answer"
