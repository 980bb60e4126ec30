"""Reader of the O-LoRA benchmark: ``<GROUP>/<TASK>/{train,dev,test}.json`` and ``labels.json``.

Rows are ``{"sentence", "label"}``. The prompt is the group's instruction, the options, the
sentence and ``Answer:``, as the benchmark builds it but without its ``Task:`` and ``Dataset:``
lines: they name the task, which a continually trained model has to find out for itself.
"""

from __future__ import annotations

from pathlib import Path

from treelora_cli.errors import DataError
from treelora_cli.tasks.jsonrows import (
    Fields,
    Record,
    describe,
    parse_json,
    read_records,
    text_of,
)
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import Loaded, TaskSource, build
from treelora_cli.tasks.types import SPLITS, Row

SEPARATOR = " "
LABELS_FILE = "labels.json"
INSTRUCTIONS_FILE = "instruction_config.json"


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one task; None where ``problems`` took something.

    Args:
        source: a task whose ``files`` name all three splits.
        problems: takes what is wrong with the rows.

    Raises:
        DataError: ``labels.json`` or ``instruction_config.json`` cannot be used.
    """
    before = len(problems)
    folder = source.files["train"].parent
    labels = read_labels(folder / LABELS_FILE)
    group = folder.parent.name
    instructions = folder.parent.parent / INSTRUCTIONS_FILE
    instruction = read_instruction(instructions, group)
    head = prompt_head(instruction, labels)
    splits = {split: _read_split(source.files[split], head, labels, problems) for split in SPLITS}
    if len(problems) > before:
        return None
    notes = []
    if instruction is None and not instructions.exists():
        notes.append(f"{source.name}: no {INSTRUCTIONS_FILE} beside {group}/, so no instruction")
        mapped = "sentence -> prompt, label -> answer"
    elif instruction is None:
        mapped = "sentence + 'Answer:' -> prompt, label -> answer"
    else:
        mapped = f"{group} instruction + options + sentence + 'Answer:' -> prompt, label -> answer"
    return build(source, splits, mapped=mapped, separator=SEPARATOR, labels=labels, notes=notes)


def prompt_head(instruction: str | None, labels: tuple[str, ...]) -> str:
    """Return what stands before the sentence: instruction and options, or nothing.

    A group without an instruction (COPA) asks its question in the sentence and names the
    options there.
    """
    if instruction is None:
        return ""
    return f"{instruction}Option: {', '.join(labels)} \n"


def make_prompt(head: str, sentence: str) -> str:
    """Return the whole prompt; the sentence is left as it is but for a missing last newline."""
    newline = "" if sentence.endswith("\n") else "\n"
    return f"{head}{sentence}{newline}Answer:"


def read_labels(path: Path) -> tuple[str, ...]:
    """Read ``labels.json``, a list of texts.

    Raises:
        DataError: unreadable, or not a list of distinct, non-empty texts.
    """
    found = parse_json(path)
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: found {describe(found)}, expected a list of labels")
    for label in found:
        if not isinstance(label, str) or not label.strip():
            raise DataError(f"{path}: found the label {describe(label)}, expected text")
    if len(set(found)) != len(found):
        raise DataError(f"{path}: a label occurs twice, expected distinct labels")
    return tuple(str(label) for label in found)


def read_instruction(path: Path, group: str) -> str | None:
    """Return the group's first zero-shot instruction; None if there is none for it.

    Raises:
        DataError: the file is no mapping of groups to lists of instructions.
    """
    if not path.exists():
        return None
    found = parse_json(path)
    if not isinstance(found, Fields):
        raise DataError(f"{path}: found {describe(found)}, expected an object of groups")
    entries = found.get(group, [])
    if not isinstance(entries, list):
        raise DataError(f"{path}: {group}: found {describe(entries)}, expected a list")
    for entry in entries:
        text = entry.get("instruction") if isinstance(entry, Fields) else None
        if not isinstance(text, str):
            raise DataError(f"{path}: {group}: an entry has no instruction text")
        if entry.get("instruction_type", "zero-shot") == "zero-shot":
            return text if text.endswith("\n") else f"{text}\n"
    return None


def _read_split(
    path: Path, head: str, labels: tuple[str, ...], problems: Problems
) -> tuple[Row, ...]:
    before = len(problems)
    rows: list[Row] = []
    for record in read_records(path, problems):
        sentence = text_of(record, "sentence", problems)
        label = _label(record, labels, problems)
        if sentence is not None and label is not None:
            rows.append(Row(make_prompt(head, sentence), label))
    if not rows and len(problems) == before:
        problems.add(str(path), "found no rows, expected at least one")
    return tuple(rows)


def _label(record: Record, labels: tuple[str, ...], problems: Problems) -> str | None:
    label = text_of(record, "label", problems, numbers=True)
    if label is not None and label not in labels:
        what = f"label: found {label[:40]!r}, expected one of: {', '.join(labels)}"
        problems.bad_row(record.where, "label: not a known one", what, record.fields)
        return None
    return label
