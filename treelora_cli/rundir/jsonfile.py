"""Read JSON that may be damaged or hostile: every failure is one RunDirError with a reason."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.storage import storage_errors

MAX_BYTES = 50 * 1024 * 1024


def dump_json(doc: object, *, indent: int | None = 2) -> bytes:
    """Return ``doc`` as UTF-8 JSON with sorted keys and a newline at the end.

    A lone surrogate (a model can produce one) becomes its JSON escape and reads back the same.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(doc, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return a regular file's content without following a symbolic link at its end.

    Args:
        path: the file.
        max_bytes: refuse anything longer, before reading it.

    Raises:
        RunDirError: it is missing, no regular file, a link, too long or unreadable.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with storage_errors(path, "read"), os.fdopen(os.open(path, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RunDirError(f"{path} is not a regular file", "put the original file back")
        if status.st_size > max_bytes:
            raise RunDirError(
                f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} allowed",
                "it cannot have been written by treelora; put the original file back",
            )
        return stream.read(max_bytes + 1)


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object stored in a file.

    Args:
        path: the file.
        max_bytes: refuse anything longer, before reading it.

    Raises:
        RunDirError: missing, too long, not UTF-8, not JSON (NaN and duplicate keys included),
            nested too deeply, or not an object.
    """
    reason = "is damaged"
    try:
        return parse_object(read_bytes(path, max_bytes))
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:
        reason = f"is damaged: {error}"
    raise RunDirError(f"{path} {reason}", "put the original file back, or start a new run")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Raises:
        ValueError: it is not strict UTF-8 JSON with an object at the top.
        RecursionError: it is nested too deeply.
    """
    if not data.strip():
        raise ValueError("it is empty")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it starts with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    doc = json.loads(
        text,
        object_pairs_hook=_unique,
        parse_constant=_refuse_constant,
        parse_float=_finite,
    )
    if not isinstance(doc, dict):
        raise ValueError(f"it holds a {type(doc).__name__}, not an object")
    return doc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value
