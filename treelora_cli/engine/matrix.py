"""Which cells of the score matrix are due, before and after a unit is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treelora_cli.engine.evaluation import BASE, Asked, Evaluator
from treelora_cli.engine.store import load_adapter, snapshot_hash
from treelora_cli.engine.units import Unit
from treelora_cli.methods.base import Mode
from treelora_cli.recipe import EvalSection
from treelora_cli.tasks.types import Task


@dataclass(frozen=True)
class Matrix:
    """Scores the live adapter on what a run's numbers need.

    Attributes:
        evaluator: computes and keeps cells.
        plan: the recipe's ``eval`` section.
        mode: whose adapter answers.
        tasks: the whole stream.
    """

    evaluator: Evaluator
    plan: EvalSection
    mode: Mode
    tasks: Sequence[Task]

    def before(self, unit: Unit) -> None:
        """The zero-shot cells, and the cells just before training (both for FWT)."""
        if self.plan.when == "none":
            return
        before = self.plan.before and self.plan.when == "all" and self.mode == "latest"
        for task in unit.tasks:
            if self.plan.zero_shot:
                base = self.evaluator.run.info.base_fingerprint
                self.evaluator.cell(Asked(None, task, BASE, base))
            if before and unit.previous is not None:
                after, answering = unit.previous[1], self._live_hash()
                self.evaluator.cell(Asked(after, task, "latest", answering, unit.previous))

    def after(self, unit: Unit) -> None:
        """The row after a unit: all tasks so far, or the task's own cell."""
        when = self.plan.when
        if when == "none" or (when == "last" and unit.index < len(self.tasks) - 1):
            return
        if self.mode == "own":
            first = 0 if when == "last" else unit.index
            for column in range(first, unit.index + 1):
                self._own(column)
            return
        answering = self._live_hash()
        for task in self.tasks[: unit.index + 1]:
            self.evaluator.cell(Asked(unit.task.name, task, "latest", answering, unit.place))

    def _own(self, index: int) -> None:
        """An own adapter does not change with later tasks: one cell holds for all of them."""
        task = self.tasks[index]
        place = (index, task.name)
        snapshot = load_adapter(self.evaluator.run, *place)
        live = self.evaluator.adapted.snapshot()
        self.evaluator.adapted.restore(snapshot)
        try:
            self.evaluator.cell(Asked(task.name, task, "own", snapshot_hash(snapshot), place))
        finally:
            self.evaluator.adapted.restore(live)

    def _live_hash(self) -> str:
        return snapshot_hash(self.evaluator.adapted.snapshot())
