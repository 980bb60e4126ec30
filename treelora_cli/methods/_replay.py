"""Rows of earlier tasks that join a step's loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from treelora_cli.methods._memory import draw
from treelora_cli.methods.base import TaskContext
from treelora_cli.models.encode import Example


def joined_loss(task: TaskContext, rows: Sequence[Example], ratio: float, step: int) -> Tensor:
    """Return what to add to a step's loss so that stored rows count as much as its own.

    With L_n the mean loss of the step's own n rows and L_m that of m drawn ones, the mean over all
    is (n L_n + m L_m) / (n + m), which has the direction of L_n + (m / n) L_m.

    Args:
        task: the task that is trained; n is what its steps see on average.
        rows: what to draw from, at least one.
        ratio: rows drawn for each of the step's own, at least one in all.
        step: of the task; another step draws anew.

    Returns:
        (m / n) L_m, a scalar in the graph.
    """
    own = rows_of_a_step(task)
    drawn = draw(rows, max(1, round(ratio * own)), task.seed, step)
    return task.ask.loss(drawn) * (len(drawn) / own)


def rows_of_a_step(task: TaskContext) -> float:
    """Return how many rows of its own an optimizer step of a task sees on average."""
    return len(task.rows) / task.steps_per_epoch
