"""scores.json: one cell per measurement, in an order and a form that depend on nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.files import write_json
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.names import is_task_name

FORMAT = 1

Key = tuple[str | None, str, str, str, int, bool, str]
"""(after, task, adapter, split, rows, limited, decoding): what makes two cells the same one."""


@dataclass(frozen=True)
class Cell:
    """The score of one task at one moment.

    Attributes:
        after: the last trained task; None before any training (zero shot).
        task: the task that was evaluated.
        adapter: which adapter answered: ``latest``, ``own``, ``task:NAME`` or ``base``; or for each
            row that of the task it looks like, ``route[:THRESHOLD][:stripped]``: rows less typical
            than the threshold went to the base, prompts were looked at without their instruction.
        split: ``eval`` or ``test``.
        rows: how many rows were evaluated.
        limited: True if ``--limit`` left rows out; such a cell never enters a summary.
        decoding: a short text that names the decoding, such as ``greedy``.
        metric: the metric of ``score``.
        score: 0 to 1, higher is better.
        scores: every reading by metric name, ``score`` included.
        adapter_hash: SHA-256 of the weights that answered; under ``route`` over those of all
            adapters, what is known of each task's prompts, and how was routed.
        code: the version of prompts, decoding and metrics; files from before it was kept have 1.
    """

    after: str | None
    task: str
    adapter: str
    split: str
    rows: int
    limited: bool
    decoding: str
    metric: str
    score: float
    scores: dict[str, float] = field(hash=False)
    adapter_hash: str = ""
    code: int = 1

    @property
    def key(self) -> Key:
        """What makes two cells the same measurement."""
        return (
            self.after,
            self.task,
            self.adapter,
            self.split,
            self.rows,
            self.limited,
            self.decoding,
        )

    @property
    def source(self) -> tuple[str, str, str, int, bool, str, int]:
        """What decides the answers: two cells that share it have the same ones."""
        return (
            self.adapter_hash,
            self.task,
            self.split,
            self.rows,
            self.limited,
            self.decoding,
            self.code,
        )


class Scores:
    """The cells of a run.

    Args:
        cells: where two have the same key, the later one counts.
    """

    def __init__(self, cells: Iterable[Cell] = ()) -> None:
        self._cells: dict[Key, Cell] = {}
        for cell in cells:
            self.put(cell)

    @property
    def cells(self) -> list[Cell]:
        """All cells, sorted by key; zero shot comes first."""
        return sorted(self._cells.values(), key=lambda cell: _order(cell.key))

    def put(self, cell: Cell) -> None:
        """Add a cell, in place of the one with the same key if there is one.

        Raises:
            ValueError: a number of the cell is not finite, or a field has the wrong type.
        """
        problem = _problem(asdict(cell))
        if problem:
            raise ValueError(f"the cell {cell.key}: {problem}")
        readings = {name: float(value) for name, value in cell.scores.items()}
        self._cells[cell.key] = replace(cell, score=float(cell.score), scores=readings)

    def get(self, key: Key) -> Cell | None:
        """Return the cell with that key, or None."""
        return self._cells.get(key)

    def same_answers(self, wanted: Cell) -> Cell | None:
        """Return a cell that has the answers of a wanted one, whatever its key, or None.

        Equal are the weights, the rows, the decoding and the code. Base and task need not be
        compared by content: a run has one base, and one fingerprint a task, checked when opened.
        """
        return next((cell for cell in self.cells if cell.source == wanted.source), None)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read a scores.json; a missing file has no cells.

        Raises:
            RunDirError: damaged, or of a newer format.
        """
        path = Path(path)
        if not path.exists() and not path.is_symlink():
            return cls()
        doc = read_json(path)
        version, rows = doc.get("format"), doc.get("cells")
        if isinstance(version, int) and version > FORMAT:
            raise RunDirError(
                f"{path} was created by a newer version of treelora (format {version})",
                "upgrade treelora",
            )
        if version != FORMAT or not isinstance(rows, list):
            raise _damaged(path, "it names no format or no cells")
        return cls(_cell(path, number, row) for number, row in enumerate(rows))

    def save(self, path: Path) -> None:
        """Replace a scores.json atomically; equal cells give equal bytes.

        Raises:
            EnvironmentProblem: the disk is full.
            RunDirError: another failure of the file system.
        """
        write_json(path, {"format": FORMAT, "cells": [asdict(cell) for cell in self.cells]})


def _order(key: Key) -> tuple[str, str, str, str, int, bool, str]:
    return (key[0] or "", *key[1:])


def _cell(path: Path, number: int, row: Any) -> Cell:
    names = {entry.name for entry in fields(Cell)}
    if not isinstance(row, dict) or set(row) | {"code"} != names:
        raise _damaged(path, f"cell {number} does not have the fields of a cell")
    problem = _problem(row)
    if problem:
        raise _damaged(path, f"cell {number}: {problem}")
    return Cell(**row)


def _problem(row: dict[str, Any]) -> str:
    """Say what is wrong with a cell's fields; empty if nothing is."""
    texts = ("adapter", "split", "decoding", "metric", "adapter_hash")
    rows, readings = row["rows"], row["scores"]
    checks = {
        "'after' is no task name": row["after"] is None or is_task_name(row["after"]),
        "'task' is no task name": is_task_name(row["task"]),
        f"one of {', '.join(texts)} is no text": all(isinstance(row[name], str) for name in texts),
        "'limited' is neither true nor false": isinstance(row["limited"], bool),
        "'rows' is no count": type(rows) is int and rows >= 0,
        "'code' is no version": type(row.get("code", 1)) is int,
        "'score' is no finite number": _is_number(row["score"]),
        "'scores' holds something that is no finite number": isinstance(readings, dict)
        and all(map(_is_number, readings.values())),
    }
    return next((problem for problem, holds in checks.items() if not holds), "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _damaged(path: Path, reason: str) -> RunDirError:
    return RunDirError(
        f"{path} is damaged: {reason}", "move it away and evaluate again with `treelora eval`"
    )
