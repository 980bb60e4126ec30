"""Reader of plain JSON and JSON lines: one file a task, or a folder with one file a split.

The columns may be called prompt/answer, prompt/completion, instruction(+input)/output,
input/output, question/answer or text/label. One file is split by a hash of its prompts; a
missing evaluation split is taken from the training rows in the same way. Both are reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from treelora_cli.tasks.jsonrows import Record, describe, read_records, text_of
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import WHOLE, Loaded, TaskSource, build
from treelora_cli.tasks.types import Row

SPLIT_SEED = 1234
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Columns:
    """Which fields hold the prompt and the answer; ``extra`` is joined to the prompt if filled."""

    prompt: str
    answer: str
    extra: str = ""

    def __str__(self) -> str:
        """Say the mapping in one line."""
        prompt = f"{self.prompt} (+ {self.extra})" if self.extra else self.prompt
        return f"{prompt} -> prompt, {self.answer} -> answer"


KNOWN_COLUMNS = (
    Columns("prompt", "answer"),
    Columns("prompt", "completion"),
    Columns("instruction", "output", extra="input"),
    Columns("input", "output"),
    Columns("question", "answer"),
    Columns("text", "label"),
)


def columns_of(names: Sequence[str]) -> Columns | None:
    """Return the first known pair of columns that a row with these fields has."""
    for columns in KNOWN_COLUMNS:
        if columns.prompt in names and columns.answer in names:
            extra = columns.extra if columns.extra in names else ""
            return Columns(columns.prompt, columns.answer, extra)
    return None


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one task; None where ``problems`` took something.

    Args:
        source: a task whose ``files`` name its splits (``eval`` may be missing) or one file
            under ``all``.
        problems: takes what is wrong with the rows.
    """
    before = len(problems)
    records = {split: read_records(path, problems) for split, path in source.files.items()}
    first = next((found[0] for found in records.values() if found), None)
    columns = columns_of(list(first.fields)) if first is not None else None
    if first is not None and columns is None:
        pairs = ", ".join(f"{known.prompt}/{known.answer}" for known in KNOWN_COLUMNS)
        names = ", ".join(map(repr, list(first.fields)[:8]))
        problems.add(first.where, f"columns: found {names}; expected one of {pairs}")
    if columns is None:
        if len(problems) == before:
            problems.add(source.place, "found no rows, expected at least one")
        return None
    read_rows = {split: _rows(found, columns, problems) for split, found in records.items()}
    for split, rows in read_rows.items():
        if not rows and len(problems) == before:
            problems.add(str(source.files[split]), "found no rows, expected at least one")
    splits, notes = _three_splits(source, read_rows, problems)
    if len(problems) > before:
        return None
    separator, note = guess_separator([row.prompt for row in splits["train"]])
    notes.append(f"{source.name}: {note}")
    return build(source, splits, mapped=str(columns), separator=separator, notes=notes)


def _rows(records: Sequence[Record], columns: Columns, problems: Problems) -> tuple[Row, ...]:
    rows: list[Row] = []
    for record in records:
        prompt = text_of(record, columns.prompt, problems)
        answer = text_of(record, columns.answer, problems, numbers=True)
        extra = record.fields.get(columns.extra, "") if columns.extra else ""
        if extra is None:
            extra = ""
        if not isinstance(extra, str):
            problems.add(record.where, f"{columns.extra}: found {describe(extra)}, expected text")
            continue
        if prompt is not None and answer is not None:
            rows.append(Row(f"{prompt}\n{extra}" if extra.strip() else prompt, answer))
    return tuple(rows)


def _three_splits(
    source: TaskSource, read_rows: dict[str, tuple[Row, ...]], problems: Problems
) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
    """Complete the splits: one file becomes three, a missing evaluation split is taken out."""
    name = source.name
    if WHOLE in read_rows:
        parts = split_by_hash(read_rows[WHOLE], ("test", "eval"))
        splits = {"train": parts["train"], "eval": parts["eval"], "test": parts["test"]}
        what = "one file, split"
    elif "eval" not in read_rows:
        parts = split_by_hash(read_rows["train"], ("eval",))
        splits = {"train": parts["train"], "eval": parts["eval"], "test": read_rows["test"]}
        what = "no evaluation file, training rows split"
    else:
        return dict(read_rows), []
    if not all(splits.values()) and not len(problems):
        problems.add(
            source.place,
            f"found {sum(map(len, splits.values()))} rows, too few to split",
            "give train, eval and test files of their own",
        )
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    return splits, [f"{name}: {what} by a hash of the prompts: {counts}"]


def split_by_hash(rows: Sequence[Row], held_out: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    """Hold out a tenth of the distinct prompts for each name; the rest is ``train``.

    Prompts are ordered by a hash of their text, so neither the order of the rows nor the
    machine matters, and rows with the same prompt stay together. Rows keep their order.

    Args:
        rows: the rows to split.
        held_out: the names of the parts taken out of the training rows, in the order taken.
    """
    seed = f"{SPLIT_SEED}\n"
    prompts = sorted(
        {row.prompt for row in rows},
        key=lambda prompt: (hashlib.sha256((seed + prompt).encode("utf-8")).digest(), prompt),
    )
    share = max(1, round(len(prompts) * _SHARE))
    part: dict[str, str] = {}
    for index, name in enumerate(held_out):
        part.update(dict.fromkeys(prompts[index * share : (index + 1) * share], name))
    return {
        name: tuple(row for row in rows if part.get(row.prompt, "train") == name)
        for name in ("train", *held_out)
    }


def guess_separator(prompts: Sequence[str]) -> tuple[str, str]:
    """Return the text to put between prompt and answer, and a note that says why.

    Nothing where every prompt ends in white space or in a script written without spaces,
    one space otherwise.
    """
    if all(prompt[-1].isspace() or prompt[-1] >= "\u2e80" for prompt in prompts):
        return "", "no separator between prompt and answer: the prompts end in one"
    return " ", "one space put between prompt and answer"
