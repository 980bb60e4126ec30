"""Which columns of a table hold the prompt and the answer: by their names, or as the user says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.tasks.dialogues import read_dialogue
from treelora_cli.tasks.jsonrows import Record, fault_of, text_of
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.types import Row


@dataclass(frozen=True, slots=True)
class Columns:
    """Where prompt and answer are.

    Attributes:
        prompt: column of the prompt.
        answer: column of the answer.
        extra: column joined to the prompt where it is filled, or empty.
        turns: column of a conversation; then the others are empty.
    """

    prompt: str = ""
    answer: str = ""
    extra: str = ""
    turns: str = ""

    def __str__(self) -> str:
        """Say the mapping in one line."""
        if self.turns:
            return f"{self.turns}: last assistant turn -> answer, turns before it -> prompt"
        prompt = f"{self.prompt} (+ {self.extra})" if self.extra else self.prompt
        return f"{prompt} -> prompt, {self.answer} -> answer"

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns without which there is no row."""
        return (self.turns,) if self.turns else (self.prompt, self.answer)


KNOWN_COLUMNS = (
    Columns("prompt", "answer"),
    Columns("prompt", "completion"),
    Columns("prompt", "response"),
    Columns("instruction", "output", extra="input"),
    Columns("instruction", "response", extra="context"),
    Columns("input", "output"),
    Columns("question", "answer"),
    Columns("text", "label"),
    Columns("sentence", "label"),
    Columns(turns="conversations"),
    Columns(turns="messages"),
    Columns(turns="conversation"),
)
"""Alpaca, sharegpt and the usual names; the first whose columns are all there is taken."""

_KEYS = {"prompt": "prompt", "answer": "answer", "input": "extra", "messages": "turns"}


def columns_of(names: Sequence[str]) -> Columns | None:
    """Return the first known mapping for a table with these columns."""
    for known in KNOWN_COLUMNS:
        if all(name in names for name in known.needed):
            extra = known.extra if known.extra in names else ""
            return Columns(known.prompt, known.answer, extra, known.turns)
    return None


def expected_columns() -> str:
    """Say which columns are known."""
    return ", ".join("/".join(known.needed) for known in KNOWN_COLUMNS)


def parse_columns(text: str) -> Columns:
    """Read ``prompt=COL,answer=COL[,input=COL]`` or ``messages=COL``.

    Raises:
        UsageError: another form, or keys that do not go together.
    """
    hint = "e.g. --columns prompt=question,answer=solution, or --columns messages=dialogue"
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UsageError(
                f"--columns {text!r}: {part.strip()!r} is not of the form KEY=COLUMN", hint
            )
        if key not in _KEYS:
            raise UsageError(f"--columns: unknown key {key!r}", did_you_mean(key, list(_KEYS)))
        if key in given:
            raise UsageError(f"--columns: {key} is given twice", hint)
        given[key] = column
    if set(given) != {"messages"} and not {"prompt", "answer"} <= set(given) - {"messages"}:
        raise UsageError(f"--columns {text!r}: give prompt and answer, or messages alone", hint)
    if "messages" in given and len(given) > 1:
        raise UsageError("--columns: messages holds prompt and answer already", hint)
    return Columns(**{_KEYS[key]: column for key, column in given.items()})


def row_of(record: Record, columns: Columns, problems: Problems) -> tuple[Row, int] | None:
    """Make a row of a record.

    Args:
        record: the record.
        columns: where prompt and answer are.
        problems: takes what is wrong with it.

    Returns:
        The row, and how many turns after the answer were left out; None if it cannot be used.
    """
    if columns.turns:
        found = read_dialogue(record, columns.turns, problems)
        return None if found is None else (Row(found[0], found[1]), found[2])
    prompt = text_of(record, columns.prompt, problems)
    answer = text_of(record, columns.answer, problems, numbers=True)
    extra = record.fields.get(columns.extra) if columns.extra else None
    fault = None if extra is None else fault_of(extra, numbers=True)
    if fault is not None and fault[0] != "empty":
        what = f"{columns.extra}: {fault[1]}"
        problems.bad_row(record.where, f"{columns.extra}: {fault[0]}", what, record.fields)
        return None
    if prompt is None or answer is None:
        return None
    return Row(prompt if extra is None or fault else f"{prompt}\n{extra}", answer), 0
