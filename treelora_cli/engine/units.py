"""What is trained at once: one task after the other, or, for a joint method, all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.engine.batches import BatchPlan, RowPlan, ThenPlan, UnionPlan
from treelora_cli.engine.seeds import derive
from treelora_cli.methods.base import Mode
from treelora_cli.recipe import Recipe
from treelora_cli.tasks.metrics import constant_score
from treelora_cli.tasks.types import Task

Place = tuple[int, str]
"""Index and name of a task in the stream, which name its folder."""


@dataclass(frozen=True)
class Unit:
    """Neighbouring tasks that are trained at once; the last one's folder holds what they leave.

    Attributes:
        index: the last one's place in the stream.
        tasks: in stream order, at least one.
        previous: the place of the unit before, None for the first.
    """

    index: int
    tasks: tuple[Task, ...]
    previous: Place | None

    @property
    def task(self) -> Task:
        """The last of the tasks."""
        return self.tasks[-1]

    @property
    def place(self) -> Place:
        """Where what they leave is kept."""
        return self.index, self.task.name

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.tasks]

    @property
    def members(self) -> range:
        """The tasks' places in the stream."""
        return range(self.index + 1 - len(self.tasks), self.index + 1)


def units(mode: Mode, tasks: Sequence[Task]) -> list[Unit]:
    """Return the units of a stream, in the order of training."""
    if mode == "joint":
        return [Unit(len(tasks) - 1, tuple(tasks), None)]
    found: list[Unit] = []
    for index, task in enumerate(tasks):
        found.append(Unit(index, (task,), found[-1].place if found else None))
    return found


def row_plan(unit: Unit, recipe: Recipe, seed: int, rehearsed: int = 0) -> RowPlan:
    """Return which rows each step of a unit sees; rows count through its tasks in order.

    Args:
        unit: what is trained.
        recipe: batch size and epochs.
        seed: decides the order.
        rehearsed: rows of other tasks behind them, read once when the unit's own are through.
    """
    plan = _own_plan(unit, recipe, seed)
    if not rehearsed:
        return plan
    then = BatchPlan(rehearsed, recipe.optim.batch_size, 1, derive(seed, "rehearsal"))
    return ThenPlan(plan, sum(len(task.splits["train"]) for task in unit.tasks), then)


def _own_plan(unit: Unit, recipe: Recipe, seed: int) -> RowPlan:
    size = recipe.optim.batch_size
    rows = [len(task.splits["train"]) for task in unit.tasks]
    epochs = [recipe.epochs_of(name) for name in unit.names]
    if len(unit.tasks) == 1:
        return BatchPlan(rows[0], size, epochs[0], seed)
    return UnionPlan(rows, size, epochs, seed)


def facts(unit: Unit, recipe: Recipe) -> dict[str, Any]:
    """Return what task.json says of the unit's tasks: the last one's facts, and all of several."""
    listed = [_facts(task, recipe.epochs_of(task.name)) for task in unit.tasks]
    return {**listed[-1], "members": listed} if len(listed) > 1 else listed[-1]


def _facts(task: Task, epochs: int) -> dict[str, Any]:
    return {
        "name": task.name,
        "metric": task.metric,
        "language": task.language,
        "labels": list(task.labels) if task.labels else None,
        "synthetic": task.synthetic,
        "source": task.source,
        "epochs": epochs,
        "train_rows": len(task.splits["train"]),
        "data_fingerprint": task.fingerprint,
        "chance": constant_score(task, "test"),
    }
