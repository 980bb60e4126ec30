"""Reader of TRACE folders: ``<TASK>/{train,eval,test}.json``, rows of prompt and answer.

The prompts hold their instruction already and the answer follows them directly: the benchmark
joins the two without a separator.
"""

from __future__ import annotations

from pathlib import Path

from treelora_cli.tasks.jsonrows import read_records, text_of
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import Loaded, TaskSource, build
from treelora_cli.tasks.types import SPLITS, Row


def read(source: TaskSource, problems: Problems) -> Loaded | None:
    """Read one task; None where ``problems`` took something.

    Args:
        source: a task whose ``files`` name all three splits.
        problems: takes what is wrong with the rows.
    """
    before = len(problems)
    splits = {split: read_pairs(source.files[split], problems) for split in SPLITS}
    if len(problems) > before:
        return None
    mapped = "prompt -> prompt, answer -> answer"
    return build(source, splits, mapped=mapped, separator="")


def read_pairs(path: Path, problems: Problems) -> tuple[Row, ...]:
    """Read rows ``{"prompt", "answer"}`` of one file; a row with a problem is left out."""
    before = len(problems)
    rows: list[Row] = []
    for record in read_records(path, problems):
        prompt = text_of(record, "prompt", problems)
        answer = text_of(record, "answer", problems, numbers=True)
        if prompt is not None and answer is not None:
            rows.append(Row(prompt, answer))
    if not rows and len(problems) == before:
        problems.add(str(path), "found no rows, expected at least one")
    return tuple(rows)
