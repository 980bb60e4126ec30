"""Score a stream while it runs, where every prompt is sent to the task that it looks like.

R[i][j] is the score on task j, its rows routed among the first i tasks: it falls where a later
adapter answers worse and where a later task draws prompts away, and BWT tells of both. Nothing is
refused: a router that abstains is a way of ``treelora eval``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from treelora_cli.engine.adapters import Place
from treelora_cli.engine.evaluation import Evaluator
from treelora_cli.engine.routed import RoutedCell, RoutedEvaluator, Shelf, routed_cell
from treelora_cli.engine.routes import Eye, Statistics, Traffic, load_statistics, sampled
from treelora_cli.recipe import RouteSection
from treelora_cli.routing.statistics import FeatureStatistics
from treelora_cli.tasks.types import Task


class RoutedStream:
    """The routed cells of a stream.

    Args:
        evaluator: answers and keeps.
        split: the rows that are asked.
    """

    def __init__(self, evaluator: Evaluator, split: str) -> None:
        self._evaluator = evaluator
        self._split = split
        stop = evaluator.stop
        self._eye = Eye(
            evaluator.adapted,
            evaluator.data,
            lambda: stop.raise_if_set("stopped while reading prompts"),
        )
        self._features: dict[str, Tensor] = {}
        self._known: dict[str, FeatureStatistics] = {}

    def score(self, learned: Sequence[Task], asked: Sequence[Task]) -> None:
        """Answer the rows of tasks, each by the adapter of a learned one.

        What the same adapter said to the same row after the task before is taken from there.

        Args:
            learned: the first tasks of the stream, at least one; all are stored.
            asked: learned or not.

        Raises:
            Interrupted: a signal came; cells that were finished are kept.
            RunDirError: what is stored of a task is missing or damaged.
        """
        places = [(index, task.name) for index, task in enumerate(learned)]
        traffic = Traffic(self._eye, self._statistics(learned, places), threshold=0.0)
        shelf = Shelf(self._evaluator.run, places)
        features = {task.name: self._read(traffic, task) for task in asked}
        answering = RoutedEvaluator(self._evaluator, shelf, self._split)
        if len(learned) > 1:
            for cell in self._cells(traffic, shelf, len(learned) - 1, asked, features):
                answering.remember(cell)
        answering.cells(self._cells(traffic, shelf, len(learned), asked, features))

    def _cells(
        self,
        traffic: Traffic,
        shelf: Shelf,
        learned: int,
        asked: Sequence[Task],
        features: Mapping[str, Tensor],
    ) -> list[RoutedCell]:
        sent = self._evaluator.world.agree(lambda: traffic.among(learned, features))
        return [
            routed_cell(traffic, shelf, learned, task, sent[task.name], self._split)
            for task in asked
        ]

    def _read(self, traffic: Traffic, task: Task) -> Tensor:
        """Return the features of a task's rows, float32 [n, H]; the base reads them once a run."""
        if task.name not in self._features:
            self._features |= traffic.read([task], self._split)
        return self._features[task.name]

    def _statistics(self, learned: Sequence[Task], places: Sequence[Place]) -> Statistics:
        """Return what tasks have stored; what they have not is made from their training rows."""
        found = load_statistics(self._evaluator.run, places)
        for task in learned:
            if task.name not in found and task.name not in self._known:
                prompts = sampled(task, RouteSection().prompts)
                self._known[task.name] = self._eye.statistics(prompts)
        return {task.name: (self._known | found)[task.name] for task in learned}
