"""The rows that were left out, as JSON lines that a person can mend and put back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treelora_cli.tasks.jsonrows import NumberText
from treelora_cli.tasks.problems import BadRow

FOLDER = "quarantine"
"""The folder beside the tasks' own in a prepared folder."""


def quarantine_lines(rows: Sequence[BadRow], sources: Sequence[Path | str]) -> bytes:
    """Return one JSON object a row: ``file``, ``line``, ``reason``, ``what`` and the ``row``.

    Files are named relative to the source they came from; in formats without lines the row's
    number stands under ``row_number``. A line that is no JSON is kept as text.

    Args:
        rows: what was left out.
        sources: where the tasks were read from.
    """
    lines = []
    for row in rows:
        number = "line" if row.place.lines else "row_number"
        document = {
            "file": _relative(row.place.file, sources),
            number: row.place.number,
            "reason": row.reason,
            "what": row.what,
            "row": _plain(row.content),
        }
        lines.append(json.dumps(document, ensure_ascii=False, default=str) + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace")


def _relative(file: str, sources: Sequence[Path | str]) -> str:
    for source in map(Path, sources):
        if Path(file) == source:
            return source.name
        if Path(file).is_relative_to(source):
            return Path(file).relative_to(source).as_posix()
    return file


def _plain(value: Any) -> Any:
    """Turn numbers that were kept as text into numbers again."""
    if isinstance(value, NumberText):
        return float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value
