"""Continual-learning numbers from a score matrix; a number with a missing part is None, never 0.

``R[i][j]`` is the score (0-1, higher is better) on task j after training on task i, both counted
from 0 here and from 1 in the formulas. ``N`` tasks have been trained. A cell that was not measured
is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Protocol

Row = Sequence[float | None]
Matrix = Sequence[Row]

DEFINITIONS = {
    "op": "mean score over all tasks learned so far, after the last of them; higher is better",
    "bwt": "mean of (score when learned - score now) over all tasks, the last one included "
    "(TreeLoRA paper's sign): positive is forgetting, lower is better",
    "bwt_lopez_paz": "mean of (score now - score when learned) over all tasks but the last "
    "(Lopez-Paz & Ranzato's sign): negative is forgetting, higher is better",
    "forgetting": "mean of (best score since learned - score now) over all tasks but the last "
    "(Chaudhry et al.); lower is better",
    "fwt": "mean of (score just before a task is learned - zero-shot score) over all tasks but "
    "the first; higher is better",
}
"""One line for each number, printed beside it."""


class CellLike(Protocol):
    """What is read of a score cell; ``treelora_cli.rundir.scores.Cell`` is one."""

    @property
    def after(self) -> str | None:
        """The last trained task; None is zero shot."""

    @property
    def task(self) -> str:
        """The task that was scored."""

    @property
    def adapter(self) -> str:
        """Which adapter answered."""

    @property
    def split(self) -> str:
        """The split that was scored."""

    @property
    def rows(self) -> int:
        """How many rows were scored."""

    @property
    def limited(self) -> bool:
        """True where ``--limit`` cut the rows."""

    @property
    def decoding(self) -> str:
        """How the answers were generated."""

    @property
    def score(self) -> float:
        """0-1, higher is better."""


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values; None when there is none or one of them is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return fmean(known) if known else None


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def op(R: Matrix, n: int | None = None) -> float | None:
    """Overall performance OP_n = (1/n) sum_{j<=n} R[n][j].

    Args:
        R: the score matrix.
        n: number of tasks learned; all rows of R when None.
    """
    n = len(R) if n is None else n
    return _mean(R[n - 1][:n]) if n else None


def op_curve(R: Matrix) -> list[float | None]:
    """OP_1 … OP_N."""
    return [op(R, n) for n in range(1, len(R) + 1)]


def bwt(R: Matrix) -> float | None:
    """BWT_N = (1/N) sum_{j<=N} (R[j][j] - R[N][j]): the TreeLoRA paper's sign, j = N included."""
    return _mean(_minus(R[j][j], R[-1][j]) for j in range(len(R)))


def bwt_lopez_paz(R: Matrix) -> float | None:
    """BWT = (1/(N-1)) sum_{j<N} (R[N][j] - R[j][j]), as Lopez-Paz & Ranzato (2017) print it."""
    return _mean(_minus(R[-1][j], R[j][j]) for j in range(len(R) - 1))


def forgetting(R: Matrix) -> float | None:
    """F_N = (1/(N-1)) sum_{j<N} (max_{j<=l<N} R[l][j] - R[N][j]) (Chaudhry et al., 2018).

    The maximum runs over the rows since task j was learned, so that the number does not depend on
    whether cells above the diagonal were measured too.
    """
    return _mean(_minus(_best(R, j), R[-1][j]) for j in range(len(R) - 1))


def _best(R: Matrix, j: int) -> float | None:
    """The best score on task j from its own row up to the last but one; None if one is missing."""
    known: list[float] = []
    for row in R[j : len(R) - 1]:
        cell = row[j]
        if cell is None:
            return None
        known.append(cell)
    return max(known)


def fwt(R: Matrix, zero_shot: Row) -> float | None:
    """FWT = (1/(N-1)) sum_{1<j<=N} (R[j-1][j] - zero_shot_j).

    Args:
        R: the score matrix.
        zero_shot: score of each task before any training, index as the columns of R.
    """
    return _mean(_minus(R[j - 1][j], zero_shot[j]) for j in range(1, len(R)))


def test_cells(
    cells: Iterable[CellLike], decoding: str | None = None, *, limited: bool = False
) -> list[CellLike]:
    """Cells of the test split that were made in one way.

    Args:
        cells: all cells of a run.
        decoding: keep only this decoding; None keeps every one.
        limited: False keeps the whole split, which alone may enter a number; True keeps what
            ``--limit`` made.
    """
    return [
        cell
        for cell in cells
        if cell.split == "test" and cell.limited == limited and decoding in (None, cell.decoding)
    ]


def matrix_from_scores(
    scores: Iterable[CellLike],
    tasks: Sequence[str],
    mode: str,
    decoding: str | None = None,
    *,
    limited: bool = False,
) -> list[list[float | None]]:
    """Arrange the test cells of one adapter mode as R, one row and column per task.

    Args:
        scores: the cells of a run.
        tasks: task names in the order of training.
        mode: the adapter mode; under ``own`` a task's adapter changes only when it is merged with
            another, so R[i][j] = R[j][j] for i >= j up to then.
        decoding: the decoding of the cells; None takes the most common one of that mode.
        limited: arrange what ``--limit`` made instead of the full test cells; for the eye only.
    """
    cells = test_cells((cell for cell in scores if cell.adapter == mode), limited=limited)
    chosen = most_common_decoding(cells) if decoding is None else decoding
    index = {name: position for position, name in enumerate(tasks)}
    R: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
    # Rows ascend, so that of two cells at one place the one with more rows stays.
    for cell in sorted(cells, key=lambda cell: cell.rows):
        if cell.decoding == chosen and cell.after in index and cell.task in index:
            R[index[cell.after]][index[cell.task]] = cell.score
    return _repeat_own(R) if mode == "own" else R


def _repeat_own(R: list[list[float | None]]) -> list[list[float | None]]:
    """Fill each column from the diagonal on: a score of a task's own adapter holds until the next.

    There is a next one where the adapter was merged with others; the first one, however late it
    was measured, holds from the beginning.
    """
    for j in range(len(R)):
        measured = [R[i][j] for i in range(j, len(R)) if R[i][j] is not None]
        known = measured[0] if measured else None
        for i in range(j, len(R)):
            R[i][j] = known = known if R[i][j] is None else R[i][j]
    return R


def zero_shot_from_scores(
    scores: Iterable[CellLike], tasks: Sequence[str], decoding: str | None = None
) -> list[float | None]:
    """The full test score of each task before any training; ``base`` cells come first.

    Args:
        scores: the cells of a run.
        tasks: task names; the answer has the same order.
        decoding: as in :func:`matrix_from_scores`.
    """
    cells = [cell for cell in test_cells(scores, decoding) if cell.after is None]
    found: dict[str, float] = {}
    for cell in sorted(cells, key=lambda cell: (cell.adapter == "base", cell.rows)):
        found[cell.task] = cell.score
    return [found.get(name) for name in tasks]


def most_common_decoding(cells: Iterable[CellLike]) -> str | None:
    """The decoding that most cells have (ties: alphabetical order); None without cells."""
    counts = Counter(cell.decoding for cell in cells)
    return min(counts, key=lambda text: (-counts[text], text)) if counts else None
