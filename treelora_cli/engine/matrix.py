"""Which cells of the score matrix are due, before and after a unit is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from treelora_cli.engine.adapters import Place, since
from treelora_cli.engine.evaluation import BASE, Asked, Evaluator, say_open_tasks
from treelora_cli.engine.routed_stream import RoutedStream
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
        say_open_tasks(self.plan.scoring, unit.tasks)
        if self.plan.zero_shot:
            base = self.evaluator.run.info.base_fingerprint
            for task in unit.tasks:
                self.evaluator.cell(Asked(None, task, BASE, base, split=self.plan.split))
        if self.plan.before and self.plan.when == "all" and unit.previous is not None:
            self._before(unit, unit.previous)

    def _before(self, unit: Unit, previous: Place) -> None:
        """Score a unit by what is learned already, unless its own adapter answers for it."""
        if self.mode == "route":
            self._routed.score(self.tasks[: previous[0] + 1], unit.tasks)
        elif self.mode == "latest":
            answering = self._hash(previous)
            self.evaluator.cells(
                Asked(previous[1], task, "latest", answering, previous, self.plan.split)
                for task in unit.tasks
            )

    def after(self, unit: Unit) -> None:
        """The row after a unit: all tasks so far, or the task's own cell."""
        when = self.plan.when
        if when == "none" or (when == "last" and unit.index < len(self.tasks) - 1):
            return
        if self.mode == "own":
            everything = range(unit.index + 1)
            due = everything if when == "last" else filter(partial(self._new, unit), everything)
            self.evaluator.cells(map(self._own, due))
            return
        learned = self.tasks[: unit.index + 1]
        at_end = unit.index == len(self.tasks) - 1
        asked = unit.tasks if when == "ends" and not at_end else learned
        if self.mode == "route":
            self._routed.score(learned, asked)
            return
        answering, split = self._hash(unit.place), self.plan.split
        self.evaluator.cells(
            Asked(unit.task.name, task, "latest", answering, unit.place, split) for task in asked
        )

    @cached_property
    def _routed(self) -> RoutedStream:
        return RoutedStream(self.evaluator, self.plan.split)

    def _own(self, index: int) -> Asked:
        """One cell holds for all later tasks, until the adapter is merged with another."""
        task = self.tasks[index]
        snapshot = load_adapter(self.evaluator.run, index, task.name)
        place = since(self.evaluator.run, (index, task.name))
        answering = snapshot_hash(snapshot)
        return Asked(place[1], task, "own", answering, place, self.plan.split, snapshot)

    def _new(self, unit: Unit, index: int) -> bool:
        """Tell whether a task's own adapter is what it is since this unit."""
        return since(self.evaluator.run, (index, self.tasks[index].name)) == unit.place

    def _hash(self, place: Place) -> str:
        """Identify what the live model answers with since a unit."""
        return snapshot_hash(load_adapter(self.evaluator.run, *place))
