"""The score matrix of a run, and how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.report import metrics
from treelora_cli.report.model import JOINT

ZERO_SHOT = "zero shot"
LEARNED = ("trained", "finished")
"""States of a task whose training is over; in the first its evaluation may still run."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one run in one adapter mode.

    Attributes:
        names: all tasks of the stream, as the run names them.
        R: one row per learned task, one column per task of the stream.
        zero_shot: the scores before any training.
        mode: the adapter mode of R.
        decoding: the decoding of all scores; None without any.
        few_rows: as R, from cells made with ``--limit``; empty when R has any score.
    """

    names: list[str]
    R: list[list[float | None]]
    zero_shot: list[float | None]
    mode: str
    decoding: str | None
    few_rows: list[list[float | None]]

    @property
    def learned(self) -> int:
        """How many tasks the numbers cover."""
        return len(self.R)

    @property
    def adapter(self) -> str:
        """The adapter of the cells that make R."""
        return answering(self.mode)

    @property
    def history(self) -> list[list[float | None]]:
        """The rows that tell of transfer and forgetting; none where all is learned at once."""
        return [] if self.mode == JOINT else self.R

    def missing(self) -> list[tuple[str, str]]:
        """Places (after, task) that OP_n, BWT, forgetting or FWT needs and that are empty."""
        if self.mode == JOINT:
            last = self.R[-1] if self.R else []
            after = f"after {self.names[-1]}"
            return [(after, self.names[j]) for j, cell in enumerate(last) if cell is None]
        found = [
            (ZERO_SHOT, self.names[j])
            for j in range(1, self.learned)
            if self.zero_shot[j] is None and self.mode != "own"
        ]
        for i, row in enumerate(self.R):
            # Row i also holds the score on the task that comes next, which FWT needs.
            needed = range(i, i + 1) if self.mode == "own" else range(min(i + 2, self.learned))
            found += [(f"after {self.names[i]}", self.names[j]) for j in needed if row[j] is None]
        return found


def answering(mode: str) -> str:
    """Return the adapter whose cells a mode counts."""
    return "latest" if mode == JOINT else mode


def score(
    entries: Sequence[Mapping[str, Any]],
    cells: Sequence[metrics.CellLike],
    mode: str,
    decoding: str | None,
) -> Scored:
    """Arrange the cells of a run.

    Args:
        entries: the tasks of run.json.
        cells: all cells of scores.json.
        mode: the adapter mode that enters the numbers.
        decoding: the decoding that does; None takes the most common one of that mode.
    """
    names = [str(entry["name"]) for entry in entries]
    if decoding is None:
        of_mode = [cell for cell in metrics.test_cells(cells) if cell.adapter == answering(mode)]
        decoding = metrics.most_common_decoding(of_mode)
    R = metrics.matrix_from_scores(cells, names, answering(mode), decoding)
    zero_shot = metrics.zero_shot_from_scores(cells, names, decoding)
    learned = _learned_at_once(entries) if mode == JOINT else _learned(entries, R)
    limited: list[list[float | None]] = []
    if not any(score is not None for row in R for score in row):
        limited = metrics.matrix_from_scores(cells, names, answering(mode), limited=True)
        limited = limited[:learned]
        limited *= any(score is not None for row in limited for score in row)
    return Scored(names, R[:learned], zero_shot, mode, decoding, limited)


def _learned_at_once(entries: Sequence[Mapping[str, Any]]) -> int:
    return len(entries) if all(entry.get("status") in LEARNED for entry in entries) else 0


def _learned(entries: Sequence[Mapping[str, Any]], R: metrics.Matrix) -> int:
    """How many leading tasks the numbers cover: all trained, the last one evaluated as well.

    A task that is trained while its evaluation still runs would leave every number empty; the
    row before it is complete and says more.
    """
    trained = 0
    for entry in entries:
        if entry.get("status") not in LEARNED:
            break
        trained += 1
    evaluating = trained > 1 and entries[trained - 1].get("status") == "trained"
    return trained - 1 if evaluating and metrics.op(R, trained) is None else trained
