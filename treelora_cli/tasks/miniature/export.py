"""Writes miniature tasks as files in TRACE's layout."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from treelora_cli.errors import UsageError
from treelora_cli.tasks.types import SPLITS, Task


def write_trace(out: Path, tasks: Iterable[Task]) -> list[Path]:
    """Write ``OUT/TASK/{train,eval,test}.json`` for every task.

    Args:
        out: a folder that is empty or does not exist yet.
        tasks: the tasks to write.

    Returns:
        The files, in the order of the tasks and their splits.

    Raises:
        UsageError: ``out`` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", "name another --out")
    files = []
    for task in tasks:
        folder = out / task.name
        folder.mkdir(parents=True)
        for split in SPLITS:
            rows = (
                json.dumps({"prompt": row.prompt, "answer": row.answer}, ensure_ascii=False)
                for row in task.splits[split]
            )
            file = folder / f"{split}.json"
            file.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
            files.append(file)
    return files
