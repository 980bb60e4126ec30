"""Merge the adapters of a finished run, or see beforehand what that would cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.engine.adapters import since, snapshot_hash, trained_places
from treelora_cli.engine.evaluate_run import (
    EvalRequest,
    prepare_evaluation,
    run_recipe,
    trained_tasks,
)
from treelora_cli.engine.evaluation import Asked, Evaluator
from treelora_cli.engine.merging import Held, Pool, keep_to, load_pool, scale_of
from treelora_cli.engine.plan import pick
from treelora_cli.engine.signals import StopFlag
from treelora_cli.errors import UsageError
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.lock import RunLock
from treelora_cli.tasks.types import Task

Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """The run's own adapters, or what one merge more makes of them.

    Attributes:
        adapters: how many are left.
        op: mean of the scores, each task answering through the adapter that stands for it.
        scores: by task, 0-1.
        limited: True where rows were cut.
        merge: the merge that led here, with names; None: nothing was merged in this step.
    """

    adapters: int
    op: float
    scores: dict[str, float]
    limited: bool
    merge: dict[str, Any] | None


def merge_run(path: Path, most: int) -> list[dict[str, Any]]:
    """Merge a finished run's adapters down to a number, on disk.

    Args:
        path: the run directory.
        most: adapters left, the newest task's included, which is never merged; at least 2.

    Returns:
        The merges in order, as :meth:`Joined.to_json` says them.

    Raises:
        UsageError: the run is not finished, or its tasks were trained at once.
        RunDirError: it is missing or damaged.
        BusyError: another process writes to it.
    """
    _check_own(RunDir.open(path))
    with RunLock(path):
        run = RunDir.open(path)
        if run.info.status != "finished":
            raise UsageError(
                f"{path} is not finished ({run.info.status}): its next step may need the adapters",
                f"finish it first: treelora train-stream --run-dir {path}",
            )
        run.sweep()
        names = [entry["name"] for entry in run.info.tasks]
        after = trained_places(run)[-1][1]
        log = EventLog(run.events)
        done = []
        for joined in keep_to(run, most, run_recipe(run).lora):
            done.append(joined.to_json(names))
            log.append("merged", sync=True, after=after, **done[-1])
    return done


def merge_curve(path: Path, request: EvalRequest, show: Show) -> Iterator[Step]:
    """Merge in memory, step by step down to one adapter, and score every step; write nothing.

    Down to two adapters each step is what :func:`merge_run` would leave; the last one merges the
    newest task's adapter too.

    Args:
        path: the run directory; it is only read.
        request: which tasks, how many rows, and where model and data are.
        show: told of every new score.

    Yields:
        The run as it is, and then every merge.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    run = RunDir.open(path)
    _check_own(run)
    learned = [name for _, name in trained_tasks(run)]
    names = pick(learned, None if request.tasks is None else list(request.tasks), "task")
    with StopFlag() as stop, tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_evaluation(run, request, names, lambda kind, fields: show(fields), stop)
        tasks, evaluator = prepared.tasks, prepared.evaluator
        pool = load_pool(run, scale_of(run_recipe(run).lora))
        # Scores that the run has already are taken from it; new ones and their answers go here.
        evaluator.run = RunDir.create(Path(scratch) / "run", run.info)
        yield from _steps(_Asker(run, evaluator, tasks, request.split), pool)


def _steps(asker: _Asker, pool: Pool) -> Iterator[Step]:
    names = [entry["name"] for entry in asker.run.info.tasks]
    asker.ask(pool.held)
    yield asker.step(len(pool.held), None)
    while len(pool.held) > 1:
        joined = pool.join()
        asker.ask([held for held in pool.held if held.members == joined.members])
        yield asker.step(len(pool.held), joined.to_json(names))


class _Asker:
    """Keeps the score of every task under the adapter that answers for it now."""

    def __init__(self, run: RunDir, evaluator: Evaluator, tasks: Sequence[Task], split: str):
        self.run = run
        self._evaluator = evaluator
        self._tasks = {task.name: task for task in tasks}
        self._split = split
        self._scores: dict[str, float] = {}
        self._limited = False

    def ask(self, changed: Iterable[Held]) -> None:
        """Score the tasks that adapters answer for."""
        for cell in self._evaluator.cells(self._asked(changed)):
            self._scores[cell.task] = cell.score
            self._limited |= cell.limited

    def _asked(self, changed: Iterable[Held]) -> Iterator[Asked]:
        places = [(entry["index"], entry["name"]) for entry in self.run.info.tasks]
        for held in changed:
            answering = snapshot_hash(held.snapshot)
            for place in (places[member] for member in held.members):
                task, after = self._tasks.get(place[1]), since(self.run, place)
                if task is not None:
                    yield Asked(after[1], task, "own", answering, after, self._split, held.snapshot)

    def step(self, adapters: int, merge: dict[str, Any] | None) -> Step:
        """Return where the merging stands."""
        scores = {name: self._scores[name] for name in self._tasks}
        op = sum(scores.values()) / len(scores)
        return Step(adapters, op, scores, self._limited, merge)


def _check_own(run: RunDir) -> None:
    if run.info.extra.get("mode") == "joint":
        raise UsageError(
            "the tasks of this run were trained at once: it has one adapter, and nothing to merge",
            "merge a run of a method that learns task after task",
        )
    if run.info.extra.get("answer", "adapter") != "adapter":
        raise UsageError(
            f"{run.info.method} does not answer with one adapter of a fixed rank for each task",
            "merge a run of another method, such as per-task, seqlora or treelora",
        )
