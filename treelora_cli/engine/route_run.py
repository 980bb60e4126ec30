"""Score a run without being told the tasks: every prompt is answered by the adapter it is sent to.

The numbers of a stream need R[i][j], the score on task j when the tasks up to i were learned. A
task's own adapter does not change later, so the history can be told afterwards: the rows of task j
are routed among the first i tasks, and only rows that go elsewhere than before need a new answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treelora_cli.engine.adapters import Place
from treelora_cli.engine.evaluate_run import (
    EvalRequest,
    check_rows,
    listed,
    logged,
    prepare_evaluation,
    recipe_for,
    trained_tasks,
    writing,
)
from treelora_cli.engine.evaluation import BASE, Evaluator
from treelora_cli.engine.opening import load_stream_tasks
from treelora_cli.engine.plan import pick
from treelora_cli.engine.routed import RoutedEvaluator, Shelf, routed_cell
from treelora_cli.engine.routes import (
    Eye,
    Sent,
    Statistics,
    Traffic,
    instruction,
    load_statistics,
    sampled,
)
from treelora_cli.engine.signals import StopFlag
from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import RunDirError, TreeloraError, UsageError
from treelora_cli.recipe import Recipe, RouteSection
from treelora_cli.routing.quality import accuracy, confusion
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import read_merged
from treelora_cli.rundir.scores import Cell
from treelora_cli.tasks.shared_text import strip_shared
from treelora_cli.tasks.types import Task

logger = logging.getLogger("treelora")


@dataclass(frozen=True)
class RouteRequest:
    """How rows are routed.

    Attributes:
        threshold: abstain below this confidence; None: the recipe's.
        stripped: look at prompts without their task's shared instruction.
        history: score the tasks as after every task of the stream, not only as they are now.
    """

    threshold: float | None = None
    stripped: bool = False
    history: bool = False


@dataclass(frozen=True)
class RouteResult:
    """What came of it.

    Attributes:
        cells: those after the last task, in stream order; before them, with a history, those
            after every earlier task.
        routing: how well the rows of the last moment were routed and what it took, as JSON values.
    """

    cells: list[Cell]
    routing: dict[str, Any]


def route_run(
    path: Path,
    request: EvalRequest,
    way: RouteRequest,
    show: Callable[[dict[str, Any]], None],
    world: World = ALONE,
) -> RouteResult:
    """Evaluate a run's adapters, each row through the one it is sent to.

    Args:
        path: the run directory.
        request: what to evaluate; its ``adapter`` is not looked at.
        way: how rows are routed.
        show: told of every new cell.
        world: the processes that evaluate together, all called with the same arguments.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    run = RunDir.open(path)
    places = trained_tasks(run)
    _refuse(run, way)
    names = pick([name for _, name in places], listed(request.tasks), "task")
    with StopFlag(world.largest) as stop, writing(path, world):
        prepared = prepare_evaluation(run, request, names, logged(run, show), stop, world)
        tasks, evaluator = prepared.tasks, prepared.evaluator
        traffic = _traffic(run, request, way, places, evaluator, stop)
        return _Routing(evaluator, traffic, places, tasks, request.split).run(way.history)


def _refuse(run: RunDir, way: RouteRequest) -> None:
    if run.info.extra.get("mode") == "joint":
        raise UsageError(
            "the tasks of this run were trained at once: it has one adapter, and nothing to choose",
            "use --adapter latest",
        )
    if run.info.extra.get("answer") == "more":
        raise UsageError(
            f"{run.info.method} answers with more than LoRA, which cannot differ from row to row",
            "use --adapter latest or task:NAME",
        )
    if way.threshold is not None and not 0 <= way.threshold <= 1:
        raise UsageError(f"a threshold of {way.threshold} is not between 0 and 1")
    if way.history and read_merged(run):
        raise UsageError(
            "adapters of this run were merged: what they were after earlier tasks is gone",
            "leave --history out: --adapter route answers through the merged adapters",
        )


def _traffic(
    run: RunDir,
    request: EvalRequest,
    way: RouteRequest,
    places: Sequence[Place],
    evaluator: Evaluator,
    stop: StopFlag,
) -> Traffic:
    # The whole of the training rows, whatever is asked of the test rows.
    recipe = recipe_for(run, EvalRequest(model=request.model, data=request.data))
    eye = Eye(
        evaluator.adapted, recipe.data, lambda: stop.raise_if_set("stopped while reading prompts")
    )
    threshold = recipe.route.threshold if way.threshold is None else way.threshold
    if not way.stripped:
        return Traffic(eye, _statistics(run, recipe, eye, places), threshold)
    tasks = _training_tasks(run, recipe, [name for _, name in places])
    parts = {task.name: instruction(task) for task in tasks}
    found = {}
    for task in tasks:
        bare = [strip_shared(prompt, parts[task.name]) for prompt in _prompts(recipe, task)]
        found[task.name] = eye.statistics(bare)
    return Traffic(eye, found, threshold, parts)


def _statistics(run: RunDir, recipe: Recipe, eye: Eye, places: Sequence[Place]) -> Statistics:
    """Return what tasks have stored; what they have not is made from the run's data."""
    found = load_statistics(run, places)
    missing = [name for _, name in places if name not in found]
    if missing:
        logger.info("reading training prompts of %s, for routing", ", ".join(missing))
        for task in _training_tasks(run, recipe, missing):
            found[task.name] = eye.statistics(_prompts(recipe, task))
    return {name: found[name] for _, name in places}


def _prompts(recipe: Recipe, task: Task) -> list[str]:
    return sampled(task, recipe.route.prompts or RouteSection().prompts)


def _training_tasks(run: RunDir, recipe: Recipe, names: Sequence[str]) -> list[Task]:
    """Load tasks of a run for their training rows.

    Raises:
        RunDirError: the data are not there.
    """
    try:
        tasks = load_stream_tasks(recipe, names)
        check_rows(run, tasks)
    except TreeloraError as error:
        raise RunDirError(
            f"{run.path} does not hold what routing needs to know of {', '.join(names)}, and the "
            f"task data cannot be read: {error.message}",
            "give the run's own data, with all of these tasks, by --data",
        ) from None
    return tasks


class _Routing:
    """The rows of some tasks, where they go and what is answered.

    Args:
        evaluator: answers and keeps.
        traffic: routes.
        places: of all learned tasks.
        tasks: those that are asked.
        split: their rows.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        traffic: Traffic,
        places: Sequence[Place],
        tasks: Sequence[Task],
        split: str,
    ) -> None:
        self._evaluator = evaluator
        self._traffic = traffic
        self._places = places
        self._tasks = tasks
        self._split = split
        self._shelf = Shelf(evaluator.run, places)

    def run(self, history: bool) -> RouteResult:
        """Route and answer."""
        now = len(self._places)
        features = self._traffic.read(self._tasks, self._split)
        moments = range(1, now + 1) if history else [now]
        routed = self._evaluator.world.agree(lambda: list(self._traffic.send(features, moments)))
        sent = {(i, name): one for i, name, one in routed}
        wanted = [(i, task) for task in self._tasks for i in moments if (i, task.name) in sent]
        cells = RoutedEvaluator(self._evaluator, self._shelf, self._split).cells(
            [
                routed_cell(self._traffic, self._shelf, i, task, sent[i, task.name], self._split)
                for i, task in wanted
            ]
        )
        order = sorted(range(len(wanted)), key=lambda number: wanted[number][0])
        last = {task.name: sent[now, task.name] for task in self._tasks}
        facts = self._evaluator.world.agree(lambda: self._facts(features, last))
        return RouteResult([cells[number] for number in order], facts)

    def _facts(self, features: dict[str, Tensor], sent: dict[str, Sent]) -> dict[str, Any]:
        names, cost = self._traffic.names, self._traffic.cost
        at = {name: number for number, name in enumerate(names)}
        true = [at[name] for name, one in sent.items() for _ in range(len(one.indices))]
        routed = torch.cat([one.indices for one in sent.values()])
        counts = confusion(true, routed, len(names))
        shares = accuracy(counts)
        asked = [name for name in names if name in sent]
        rows = counts[[at[name] for name in asked]].tolist()
        per_task = {
            name: {
                "rows": sum(row),
                "accuracy": float(shares[at[name]]),
                "own_adapter": self._to_own_adapter(at[name], row) / sum(row),
                "abstained": row[-1],
            }
            for name, row in zip(asked, rows, strict=True)
        }
        found = {
            "adapter": self._traffic.adapter,
            "learned": list(names),
            "accuracy": sum(one["accuracy"] for one in per_task.values()) / len(per_task),
            "own_adapter": sum(one["own_adapter"] for one in per_task.values()) / len(per_task),
            "abstained": sum(one["abstained"] for one in per_task.values()),
            "per_task": per_task,
            "confusion": {
                "rows": asked, "columns": [*names, BASE], "counts": rows,
            },
            "ms_per_query": {
                "features": 1000 * cost.feature_seconds / cost.queries,
                "routing": 1000 * cost.route_seconds / cost.routed,
            },
            "dot_products": _mean_dots(sent),
            "exact": self._traffic.exact,
        }  # fmt: skip
        return found | self._traffic.agreement(features)

    def _to_own_adapter(self, number: int, counts: Sequence[int]) -> int:
        """Count the rows of a task that its adapter answers: those sent to all tasks that share it.

        Args:
            number: the task's position.
            counts: where its rows went, by position.
        """
        identities = self._shelf.identities
        pairs = zip(identities, counts[:-1], strict=True)
        return sum(count for identity, count in pairs if identity == identities[number])


def _mean_dots(sent: Mapping[str, Sent]) -> float:
    return float(torch.cat([one.dots for one in sent.values()]).double().mean())
