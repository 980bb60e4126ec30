"""Reader of what ``treelora prepare`` wrote: JSON lines a split and one index of all tasks.

The index carries everything about a task that its rows do not say, and the SHA-256 of every
file: a folder that was edited by hand since is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from treelora_cli.conversation import Conversation
from treelora_cli.errors import DataError
from treelora_cli.tasks.dialogues import read_turns
from treelora_cli.tasks.fingerprint import fingerprint
from treelora_cli.tasks.jsonrows import (
    Fields,
    NumberText,
    describe,
    parse_json,
    read_records,
    text_of,
)
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import PREPARED, Loaded, TaskSource
from treelora_cli.tasks.types import SPLITS, Row, Task

# Not called manifest.json: the commit protocol adds MANIFEST.json, and some file systems do not
# tell the two apart.
INDEX_FILE = "prepared.json"
FORMAT = 1

_AGAIN = "run `treelora prepare` again"


def read_index(root: Path) -> Fields:
    """Return the index of a prepared folder.

    Raises:
        DataError: unreadable, damaged, or of another format version.
    """
    path = root / INDEX_FILE
    index = parse_json(path)
    if not isinstance(index, Fields) or "format" not in index:
        raise DataError(f"{path}: not an index of prepared tasks", _AGAIN)
    if index["format"] != str(FORMAT):
        raise DataError(
            f"{path}: found format {str(index['format'])[:20]}, expected {FORMAT}",
            "it was written by another version of treelora: use that one, or prepare again",
        )
    if not isinstance(index.get("tasks"), Fields):
        raise DataError(f"{path}: tasks: expected an object of tasks", _AGAIN)
    return index


def find_prepared(root: Path) -> dict[str, TaskSource]:
    """Return the tasks of a prepared folder by name.

    Raises:
        DataError: the index cannot be used.
    """
    names = sorted(read_index(root)["tasks"])
    return {
        name: TaskSource(
            name, PREPARED, {split: root / name / f"{split}.jsonl" for split in SPLITS}, f"{name}/"
        )
        for name in names
    }


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one prepared task; None where ``problems`` took something.

    Args:
        source: a task found by ``find_prepared``.
        problems: takes what is wrong with the rows.

    Raises:
        DataError: the index is damaged, or a file is not the one that was prepared.
    """
    root = source.files["train"].parent.parent
    where = f"{root / INDEX_FILE}: {source.name}"
    entry = read_index(root)["tasks"][source.name]
    if not isinstance(entry, Fields):
        raise DataError(f"{where}: found {describe(entry)}, expected an object", _AGAIN)
    for split in SPLITS:
        _check_file(source.files[split], _field(_field(entry, "files", where), split, where))
    before = len(problems)
    splits = {split: _rows(source.files[split], problems) for split in SPLITS}
    if len(problems) > before:
        return None
    labels = entry.get("labels")
    task = Task(
        name=source.name,
        metric=_text(entry, "metric", where),
        language=_text(entry, "language", where),
        max_answer_tokens=_count(entry, "max_answer_tokens", where),
        splits=splits,
        fingerprint=_text(entry, "fingerprint", where),
        labels=tuple(str(label) for label in labels) if isinstance(labels, list) else None,
        reading=_text(entry, "reading", where),
        separator=_text(entry, "separator", where),
        source=_text(entry, "source", where),
        synthetic=entry.get("synthetic") is True,
    )
    found = fingerprint(task.name, task.metric, task.reading, splits, task.separator)
    if found != task.fingerprint:
        raise DataError(f"{where}: the rows do not match the fingerprint in the index", _AGAIN)
    mapped = "prompt -> prompt, answer -> answer"
    return Loaded(task, PREPARED, mapped)


def _rows(path: Path, problems: Problems) -> tuple[Row, ...]:
    rows: list[Row] = []
    for record in read_records(path, problems):
        prompt = text_of(record, "prompt", problems)
        answer = text_of(record, "answer", problems)
        if "turns" in record.fields:
            turns = read_turns(record, "turns", problems)
            prompt = Conversation(turns) if turns else None
        if prompt is not None and answer is not None:
            rows.append(Row(prompt, answer))
    return tuple(rows)


def _check_file(path: Path, expected: Fields) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a prepared split", _AGAIN)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected.get("sha256"):
        raise DataError(f"{path}: changed since it was prepared (SHA-256 differs)", _AGAIN)


def _field(entry: Fields, key: str, where: str) -> Fields:
    value = entry.get(key)
    if not isinstance(value, Fields):
        raise DataError(f"{where}: {key}: found {describe(value)}, expected an object", _AGAIN)
    return value


def _text(entry: Fields, key: str, where: str) -> str:
    value: Any = entry.get(key)
    if not isinstance(value, str) or isinstance(value, NumberText):
        raise DataError(f"{where}: {key}: found {describe(value)}, expected text", _AGAIN)
    return value


def _count(entry: Fields, key: str, where: str) -> int:
    value = entry.get(key)
    if not isinstance(value, NumberText) or not value.isdecimal() or int(value) < 1:
        raise DataError(f"{where}: {key}: found {describe(value)}, expected a count", _AGAIN)
    return int(value)
