"""The identity of a task's data: one SHA-256 over everything that is read, trained and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from treelora_cli.conversation import Conversation
from treelora_cli.tasks.types import SPLITS, Row


def fingerprint(
    name: str,
    metric: str,
    reading: str,
    splits: Mapping[str, Sequence[Row]],
    separator: str = "",
) -> str:
    """Return the hex SHA-256 of a task's name, metric, reading, separator and rows.

    Every text goes in as its UTF-8 length and its bytes, every split with its number of rows, so
    that no two different tasks give the same stream of bytes. Splits are taken in the order
    train, eval, test, rows in their own order.

    Args:
        name: the task's name.
        metric: its metric.
        reading: how a prediction is read.
        splits: rows by split name; a missing split counts as an empty one.
        separator: the text between prompt and answer.
    """
    digest = hashlib.sha256(b"treelora task 1\n")

    def put(text: str) -> None:
        data = text.encode("utf-8")
        digest.update(b"%d:" % len(data))
        digest.update(data)

    for text in (name, metric, reading, separator):
        put(text)
    for split in SPLITS:
        rows = splits.get(split, ())
        put(split)
        digest.update(b"%d;" % len(rows))
        for row in rows:
            put(row.prompt)
            put(row.answer)
            if isinstance(row.prompt, Conversation):
                digest.update(b"turns%d;" % len(row.prompt.turns))
                for turn in row.prompt.turns:
                    put(turn.role)
                    put(turn.text)
    return digest.hexdigest()
