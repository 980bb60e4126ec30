"""Loading tasks by name, from a data folder or the built-in miniature ones."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from treelora_cli.errors import DataError, UsageError, did_you_mean
from treelora_cli.tasks import read_cl, read_dataset, read_plain, read_prepared, read_trace
from treelora_cli.tasks.catalog import lookup
from treelora_cli.tasks.layouts import Found, detect
from treelora_cli.tasks.problems import OnBadRow, Problems
from treelora_cli.tasks.source import (
    CL_BENCHMARK,
    DATASET,
    PLAIN,
    PREPARED,
    TRACE,
    WHOLE,
    Loaded,
    TaskSource,
)
from treelora_cli.tasks.types import SPLITS, Row, Task

Reader = Callable[[TaskSource, Problems], Loaded | None]

_READERS: dict[str, Reader] = {
    TRACE: read_trace.read,
    CL_BENCHMARK: read_cl.read,
    PLAIN: read_plain.read,
    DATASET: read_dataset.read,
    PREPARED: read_prepared.read,
}
_MOST_CLASSES = 50

log = logging.getLogger("treelora")


def available(data: Path | str | None) -> list[str]:
    """Return the names of the tasks in a place of data, or of the built-in ones.

    Raises:
        DataError: the folder holds no task.
    """
    if data is None:
        from treelora_cli.tasks import miniature

        return list(miniature.NAMES)
    return list(detect(data).tasks)


def load_tasks(names: Sequence[str], data: Path | str | None) -> list[Task]:
    """Load the tasks of a stream, in the order given; what was guessed is logged as information.

    Args:
        names: the tasks' names.
        data: a folder, a file or ``hf:ORG/NAME``; None means the built-in miniature tasks.

    Raises:
        UsageError: a name that is unknown, given twice or not allowed as a task name, or data that
            have no score.
        DataError: rows or files that cannot be used; the first ten problems are listed.
        EnvironmentProblem: a package that reads this format is not installed.
    """
    check_names(names)
    _refuse_unscored(names)
    if data is None:
        from treelora_cli.tasks import miniature

        known = list(miniature.NAMES)
        for name in names:
            if name not in known:
                raise UsageError(f"no built-in task {name!r}", did_you_mean(name, known))
        return [miniature.load(name) for name in names]
    loaded = load_found(detect(data), names)
    for one in loaded:
        mapped = [f"{one.task.name}: {one.mapped}"] if one.layout in {PLAIN, DATASET} else []
        for note in (*mapped, *one.notes):
            log.info("%s", note)
    return [one.task for one in loaded]


def _refuse_unscored(names: Sequence[str]) -> None:
    for name in names:
        info = lookup(name)
        if info is not None and info.replay_only:
            raise UsageError(
                f"{name} is for replay only: it has no metric and can be no task of a stream",
                "leave it out; to train on it all the same, give the data another name",
            )


def load_found(found: Found, names: Sequence[str], on_bad_row: OnBadRow = "error") -> list[Loaded]:
    """Load tasks with the story of how each was read.

    Args:
        found: what ``detect`` found.
        names: the tasks' names.
        on_bad_row: ``error``, or leave rows that cannot be used out, for ``Loaded.bad_rows``.

    Raises:
        UsageError: a name that is unknown, given twice or not allowed as a task name.
        DataError: rows or files that cannot be used; the first ten problems are listed.
        EnvironmentProblem: a package that reads this format is not installed.
    """
    check_names(names)
    for name in names:
        if name not in found.tasks:
            hint = did_you_mean(name, list(found.tasks))
            for place, reason in found.ignored.items():
                if Path(place).stem == name:
                    hint = f"{place} was passed over: {reason}"
            raise UsageError(f"no task {name!r} in {found.root}", hint)
    problems = Problems(on_bad_row)
    loaded = [_read(found.tasks[name], problems) for name in names]
    problems.raise_if_any()
    return [task for task in loaded if task is not None]


def _read(source: TaskSource, problems: Problems) -> Loaded | None:
    needed = {PLAIN: {"train", "test"}, DATASET: set()}.get(source.layout, set(SPLITS))
    missing = [] if WHOLE in source.files else sorted(needed - set(source.files))
    for split in missing:
        problems.add(source.place, f"no {split} file, expected train, eval and test")
    if missing:
        return None
    left_out = len(problems.bad_rows)
    try:
        loaded = _READERS[source.layout](source, problems)
    except DataError as error:
        # One unreadable file is one problem among others of the same run.
        problems.add(*_parts(error), hint=error.hint)
        return None
    if loaded is None:
        return None
    bad_rows = sorted(problems.bad_rows[left_out:], key=lambda row: row.place.sort_key)
    return dataclasses.replace(loaded, bad_rows=tuple(bad_rows))


def _parts(error: DataError) -> tuple[str, str]:
    where, _, what = error.message.partition(": ")
    return where, what


def check_names(names: Sequence[str]) -> None:
    """Check task names.

    Raises:
        UsageError: a name that is not allowed, or given twice.
    """
    from treelora_cli.rundir.names import check_task_name

    for name, times in Counter(names).items():
        check_task_name(name)
        if times > 1:
            raise UsageError(f"task {name!r} is named {times} times", "name each task once")


def limit_rows(task: Task, train: int | None, evaluation: int | None, seed: int) -> Task:
    """Return the task with at most that many rows a split, the shares of its answers kept.

    Which rows stay depends on their text and the seed, not on the order of the file; they keep
    that order. The fingerprint stays that of the whole data; ``source`` tells the limits.

    Args:
        task: the task.
        train: the most training rows; None keeps all.
        evaluation: the most rows of eval and of test each; None keeps all.
        seed: another seed picks other rows.

    Raises:
        UsageError: a limit below 1.
    """
    for limit in (train, evaluation):
        if limit is not None and limit < 1:
            raise UsageError(f"found a limit of {limit} rows, expected at least 1")
    limits = {"train": train, "eval": evaluation, "test": evaluation}
    splits = {
        split: _sample(task, task.splits[split], limits.get(split), f"{seed}\n{split}\n")
        for split in task.splits
    }
    if splits == task.splits:
        return task
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    return dataclasses.replace(task, splits=splits, source=f"{task.source} (limited: {counts})")


def _sample(task: Task, rows: tuple[Row, ...], limit: int | None, salt: str) -> tuple[Row, ...]:
    if limit is None or limit >= len(rows):
        return rows
    classes: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        answer = row.answer.strip()[:1] if task.reading == "first_letter" else row.answer
        classes.setdefault(answer, []).append(index)
    if len(classes) > _MOST_CLASSES:
        classes = {"": list(range(len(rows)))}
    chosen: list[int] = []
    for answer, take in _quotas(classes, limit).items():
        ranked = sorted(classes[answer], key=lambda index: _rank(rows[index], salt))
        chosen.extend(ranked[:take])
    return tuple(rows[index] for index in sorted(chosen))


def _quotas(classes: dict[str, list[int]], limit: int) -> dict[str, int]:
    """Share ``limit`` among the classes by size; what rounding leaves goes to the largest rest."""
    total = sum(map(len, classes.values()))
    quotas = {answer: limit * len(rows) // total for answer, rows in classes.items()}
    by_rest = sorted(classes, key=lambda answer: (-(limit * len(classes[answer]) % total), answer))
    for answer in by_rest[: limit - sum(quotas.values())]:
        quotas[answer] += 1
    return quotas


def _rank(row: Row, salt: str) -> bytes:
    text = f"{salt}{len(row.prompt)}\n{row.prompt}{row.answer}"
    return hashlib.sha256(text.encode("utf-8")).digest()
