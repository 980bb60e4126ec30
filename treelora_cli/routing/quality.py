"""How well queries were routed: confusion, accuracy, agreement of beam and exact search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora_cli.routing.router import BASE, Router


def confusion(true: Sequence[int] | Tensor, routed: Sequence[int] | Tensor, tasks: int) -> Tensor:
    """Count where the queries of each task went.

    Args:
        true: n positions of tasks.
        routed: n positions of tasks, or ``BASE`` where the router abstained.
        tasks: K.

    Returns:
        int64 [K, K + 1]; row: the true task, column: where to; the last column: abstained.

    Raises:
        ValueError: a position out of range, or unequal lengths.
    """
    rows, columns = torch.as_tensor(true).long(), torch.as_tensor(routed).long()
    if rows.shape != columns.shape:
        raise ValueError(f"{rows.numel()} true tasks and {columns.numel()} routes")
    if rows.numel() and not (
        0 <= int(rows.min()) <= int(rows.max()) < tasks
        and BASE <= int(columns.min()) <= int(columns.max()) < tasks
    ):
        raise ValueError(
            f"positions must be below {tasks} and not negative, routes at least {BASE}"
        )
    columns = torch.where(columns == BASE, tasks, columns)
    cells = torch.bincount(rows * (tasks + 1) + columns, minlength=tasks * (tasks + 1))
    return cells.reshape(tasks, tasks + 1)


def accuracy(counts: Tensor) -> Tensor:
    """Return each task's share of queries routed to it, float64 [K]; NaN for a task without any.

    Args:
        counts: int64 [K, K + 1], from :func:`confusion`; an abstention is not right.
    """
    return counts.diagonal().double() / counts.sum(1).double()


def agreement(router: Router, features: Tensor, beam: int) -> tuple[float, float]:
    """Compare a beam search over the tasks' tree with exact scoring.

    Args:
        router: over K tasks.
        features: [n, H], n >= 1.
        beam: nodes kept a level.

    Returns:
        The share of queries for which both find the same task, and the mean number of dot
        products a query of the beam (exact scoring takes K).
    """
    rows = router.whiten(features)
    exact, found = router.exact(rows), router.tree.search(rows, beam)
    return float((found.indices == exact.indices).double().mean()), float(
        found.dots.double().mean()
    )
