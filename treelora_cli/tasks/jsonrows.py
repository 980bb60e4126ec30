"""Strict reading of JSON rows: a list or JSON lines, with the file and line of every problem."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import DataError
from treelora_cli.tasks.problems import Place, Problems

_SPACE = " \t\n\r"
_PEEK_BYTES = 1 << 20


class NumberText(str):
    """A JSON number kept exactly as it was written, so that ``1.50`` stays ``1.50``."""

    __slots__ = ()


class Fields(dict[str, Any]):
    """One JSON object; ``repeated`` names the keys that occur twice in it."""

    repeated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file, or one row of a table.

    Attributes:
        where: the line on which it starts.
        fields: its members.
    """

    where: Place
    fields: Fields


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    fields = Fields(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        fields.repeated = tuple(key for key in fields if keys.count(key) > 1)
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=NumberText, parse_float=NumberText)


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8 with or without a byte order mark.

    Raises:
        DataError: not a regular file, unreadable, or not UTF-8.
    """
    if not path.is_file():
        found = "not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {found}", "give a file with rows")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: found UTF-16, expected UTF-8", "save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: found byte 0x{data[error.start]:02x}, which is not UTF-8, "
            f"at byte {error.start} of the file",
            "save the file as UTF-8",
        ) from error


def read_records(path: Path, problems: Problems) -> list[Record]:
    """Read the objects of a file: one JSON list, or one object a line.

    Lines end at LF or CR LF only; U+2028 and its like are ordinary characters. Blank lines
    between JSON lines are passed over.

    Args:
        path: the file.
        problems: takes malformed JSON, rows that are no objects and repeated keys.

    Raises:
        DataError: the file cannot be read at all.
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    if start == len(text):
        problems.add(str(path), "found an empty file, expected rows")
        return []
    if text[start] == "[":
        return _read_list(path, text, start, problems)
    return _read_lines(path, text, problems)


def parse_json(path: Path) -> Any:
    """Return the one JSON value of a small file such as ``labels.json``.

    Raises:
        DataError: unreadable or malformed; the message names line and column.
    """
    text = read_text(path)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error


def first_fields(path: Path) -> Fields | None:
    """Return the first object of a file without reading all of it; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        text = stream.read(_PEEK_BYTES).decode("utf-8-sig", errors="ignore")
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        start = _skip_space(text, start + 1)
    try:
        value, _ = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Fields) else None


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _read_lines(path: Path, text: str, problems: Problems) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(_SPACE):
            continue
        where = Place(str(path), number)
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            place = Place(str(path), number, error.pos + 1)
            problems.bad_row(place, "not JSON", f"not JSON: {error.msg}", line)
        except RecursionError:
            problems.bad_row(where, "nested too deeply", "not usable: nested too deeply", line)
        else:
            _keep(where, value, records, problems)
    return records


def _read_list(path: Path, text: str, start: int, problems: Problems) -> list[Record]:
    """Read ``[row, row, …]``, row by row, so that each row's line is known."""
    records: list[Record] = []
    line, counted = 1, 0
    at = _skip_space(text, start + 1)
    if text[at : at + 1] == "]":
        return _nothing_after(path, text, at + 1, problems, records)
    try:
        while True:
            value, end = _DECODER.raw_decode(text, at)
            line += text.count("\n", counted, at)
            counted = at
            _keep(Place(str(path), line), value, records, problems)
            at = _skip_space(text, end)
            mark = text[at : at + 1]
            if mark == "]":
                return _nothing_after(path, text, at + 1, problems, records)
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, at)
            at = _skip_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Expecting a row after ','", text, at)
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}")
    except RecursionError:
        problems.add(str(path), f"row {len(records) + 1} is nested too deeply")
    return records


def _nothing_after(
    path: Path, text: str, at: int, problems: Problems, records: list[Record]
) -> list[Record]:
    at = _skip_space(text, at)
    if at < len(text):
        line = text.count("\n", 0, at) + 1
        problems.add(f"{path}:{line}", "not JSON: text after the end of the list")
    return records


def _keep(where: Place, value: object, records: list[Record], problems: Problems) -> None:
    if not isinstance(value, Fields):
        what = f"row: found {describe(value)}, expected an object"
        problems.bad_row(where, "not an object", what, value)
        return
    for key in value.repeated:
        what = f"{key!r}: found twice in one row, expected once"
        problems.bad_row(where, "key repeated", what, value)
    if not value.repeated:
        records.append(Record(where, value))


def describe(value: object) -> str:
    """Say in a few words what a JSON value is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, NumberText):
        return f"the number {value[:20]}"
    if isinstance(value, str):
        return f"{value[:20]!r}" if value.strip() else "empty text"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"a value of type {type(value).__name__}"


def text_of(record: Record, name: str, problems: Problems, *, numbers: bool = False) -> str | None:
    """Return a field's text, or None after noting what is wrong with it.

    Args:
        record: the row.
        name: the field.
        problems: takes a missing, empty or non-text field and text that UTF-8 cannot hold.
        numbers: take a number too, as the text it was written as.
    """
    if name not in record.fields:
        what = f"{name}: missing, expected text"
        problems.bad_row(record.where, f"{name}: missing", what, record.fields)
        return None
    value = record.fields[name]
    fault = fault_of(value, numbers=numbers)
    if fault is None:
        return str(value)
    reason, what = fault
    hint = "write the answer as it should be generated, in quotes"
    is_text = isinstance(value, str) and not isinstance(value, NumberText)
    problems.bad_row(
        record.where,
        f"{name}: {reason}",
        f"{name}: {what}",
        record.fields,
        hint if numbers and not is_text else "",
    )
    return None


def fault_of(value: object, *, numbers: bool = False) -> tuple[str, str] | None:
    """Say why a value cannot be used as text: the kind of fault and the whole story, or None.

    Args:
        value: what was found.
        numbers: take a number as text.
    """
    if not isinstance(value, str) or (isinstance(value, NumberText) and not numbers):
        return "not text", f"found {describe(value)}, expected text"
    if not value.strip():
        return "empty", "found empty text, expected some text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "broken text", "found half of a surrogate pair, expected text"
    return None
