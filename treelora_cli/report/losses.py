"""The loss curve of each task, from the event log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from treelora_cli.report.model import LossPoint

MOST_POINTS = 240
"""No figure shows more; a longer curve is averaged over equal stretches."""


def loss_curves(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[LossPoint, ...]]:
    """Collect the task loss of each optimizer step, by task name.

    A resumed run repeats the steps since its checkpoint: the last one at a place stays.

    Args:
        events: the lines of ``events.jsonl``; those of another kind or shape are passed over.
    """
    losses: dict[str, dict[int, float]] = {}
    for event in events:
        task, step, loss = event.get("task"), event.get("step"), event.get("loss")
        if event.get("kind") != "step" or not isinstance(task, str) or not isinstance(step, int):
            continue
        if isinstance(loss, int | float) and math.isfinite(loss):
            losses.setdefault(task, {})[step] = float(loss)
    return {
        task: thin([LossPoint(step, curve[step]) for step in sorted(curve)])
        for task, curve in losses.items()
    }


def thin(points: Sequence[LossPoint], most: int = MOST_POINTS) -> tuple[LossPoint, ...]:
    """Average equal stretches of a curve until at most ``most`` points are left."""
    size = math.ceil(len(points) / most) if points else 1
    if size == 1:
        return tuple(points)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(
        LossPoint(stretch[-1].step, fmean(point.loss for point in stretch)) for stretch in stretches
    )
