"""Score a run's adapters again, or in another way: the `eval` command's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.engine.adapters import Place, since, trained_places
from treelora_cli.engine.building import build_model
from treelora_cli.engine.evaluation import (
    LIKELIHOOD,
    Asked,
    Emit,
    Evaluator,
    has_labels,
    say_open_tasks,
)
from treelora_cli.engine.opening import check_base, load_stream_tasks, start_method
from treelora_cli.engine.plan import pick
from treelora_cli.engine.signals import StopFlag
from treelora_cli.engine.store import Finished, load_adapter, snapshot_hash
from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import DataError, RunDirError, UsageError
from treelora_cli.methods.base import Method, build_method
from treelora_cli.recipe import Recipe, build_recipe, read_yaml
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.lock import RunLock
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.tasks.types import Task


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        adapter: ``latest``, ``own`` or ``task:NAME``; ``route`` is ``route_run``'s.
        tasks: names, or None for every trained task.
        split: ``test`` or ``eval``.
        limit: rows a task; None for all that the run uses.
        batch_size: most prompts a batch; None for the recipe's.
        scoring: ``greedy`` or ``likelihood``; None for the recipe's.
        model: where the base is now, if it moved.
        data: where the tasks are now, if they moved.
    """

    adapter: str = "latest"
    tasks: Sequence[str] | None = None
    split: str = "test"
    limit: int | None = None
    batch_size: int | None = None
    scoring: str | None = None
    model: str | None = None
    data: str | None = None


def evaluate_run(
    path: Path,
    request: EvalRequest,
    show: Callable[[dict[str, Any]], None],
    world: World = ALONE,
) -> list[Cell]:
    """Evaluate a run's adapters; cells that are known already are not computed again.

    Args:
        path: the run directory.
        request: what to evaluate.
        show: told of every new cell.
        world: the processes that evaluate together, all called with the same arguments.

    Returns:
        One cell per task, in stream order.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    run = RunDir.open(path)
    trained = trained_tasks(run)
    answering = _answering(request.adapter, trained)
    learned = [name for _, name in trained]
    if run.info.extra.get("mode") == "joint":
        learned = [entry["name"] for entry in run.info.tasks]
        _refuse_own(request.adapter)
    names = pick(learned, listed(request.tasks), "task")
    with StopFlag(world.largest) as stop, writing(path, world):
        prepared = prepare_evaluation(run, request, names, logged(run, show), stop, world)
        return _cells(prepared, trained, answering, request)


@dataclass(frozen=True)
class Prepared:
    """What a run is scored with.

    Attributes:
        tasks: those to be asked.
        evaluator: asks them.
        method: the run's, started; it has met no stored task.
    """

    tasks: list[Task]
    evaluator: Evaluator
    method: Method


@contextmanager
def writing(path: Path, world: World) -> Iterator[None]:
    """Hold a run directory for all processes; the first one locks it.

    Raises:
        RunDirError: another command is writing to it.
    """
    with RunLock(path) if world.first else nullcontext():
        world.wait()
        yield


def logged(run: RunDir, show: Callable[[dict[str, Any]], None]) -> Emit:
    """Return what writes to events.jsonl and shows what it has written."""
    log = EventLog(run.events)
    return lambda kind, fields: show(log.append(kind, sync=True, **fields))


def prepare_evaluation(
    run: RunDir,
    request: EvalRequest,
    names: Sequence[str],
    emit: Emit,
    stop: StopFlag,
    world: World = ALONE,
) -> Prepared:
    """Load tasks and model of a run, checked to be the run's own.

    Args:
        run: the run directory.
        request: in what way; its ``adapter`` and ``tasks`` are the caller's business.
        names: the tasks.
        emit: told of every new cell.
        stop: checked before every batch.
        world: the processes that evaluate together.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    recipe = recipe_for(run, request)
    tasks = load_stream_tasks(recipe, names)
    check_rows(run, tasks)
    _check_scoring(request, recipe, tasks)
    world = world.under(recipe.processes.engine)
    method = build_method(recipe)
    adapted = build_model(recipe, method, world)
    check_base(run, adapted.backbone)
    start_method(method, recipe, adapted)
    evaluator = Evaluator(
        adapted=adapted,
        data=recipe.data,
        plan=recipe.eval,
        run=run,
        scores=Scores.load(run.scores),
        limited=recipe.limit is not None,
        emit=emit,
        stop=stop,
        questions=method.questions,
        world=world,
        spread=world.spread,
    )
    return Prepared(tasks, evaluator, method)


def trained_tasks(run: RunDir) -> list[Place]:
    """Return index and name of every task whose folder is committed, in stream order.

    Raises:
        RunDirError: there is none yet.
    """
    trained = trained_places(run)
    if not trained:
        raise RunDirError(f"{run.path} has no trained task yet", "train one with train-stream")
    return trained


def listed(names: Sequence[str] | None) -> list[str] | None:
    """Return names as a list, where there are any."""
    return None if names is None else list(names)


def _answering(adapter: str, trained: list[Place]) -> Place | None:
    """Return whose adapter answers all tasks, or None if each task's own does."""
    if adapter == "own":
        return None
    if adapter == "latest":
        return trained[-1]
    if adapter.startswith("task:"):
        name = pick([place[1] for place in trained], [adapter.removeprefix("task:")], "task")[0]
        return next(place for place in trained if place[1] == name)
    raise UsageError(f"unknown adapter {adapter!r}", "use latest, own, route or task:NAME")


def _refuse_own(adapter: str) -> None:
    if adapter == "own":
        raise UsageError(
            "the tasks of this run were trained at once: none has an adapter of its own",
            "use --adapter latest",
        )


def run_recipe(run: RunDir) -> Recipe:
    """Return the recipe that a run was made with.

    Raises:
        UsageError: it cannot be read as one.
    """
    text = run.recipe_yaml.read_text(encoding="utf-8")
    return build_recipe(read_yaml(text, str(run.recipe_yaml)), str(run.recipe_yaml))


def recipe_for(run: RunDir, request: EvalRequest) -> Recipe:
    """Return the run's recipe with what is asked for put over it."""
    recipe = run_recipe(run)
    data, model = recipe.data, recipe.model
    if request.data is not None:
        data = data.model_copy(update={"path": request.data})
    if request.model is not None:
        model = model.model_copy(update={"name": request.model})
    update: dict[str, Any] = {}
    if request.batch_size is not None:
        update["batch_size"] = request.batch_size
    if request.scoring is not None:
        update["scoring"] = request.scoring
    plan = recipe.eval.model_copy(update=update)
    limit = request.limit or recipe.limit
    return recipe.model_copy(update={"data": data, "model": model, "limit": limit, "eval": plan})


def _check_scoring(request: EvalRequest, recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuse likelihood where nothing can be scored by it, and say where it cannot."""
    if request.scoring == LIKELIHOOD and not any(map(has_labels, tasks)):
        raise UsageError(
            "none of the tasks has a closed set of labels, which scoring by likelihood needs",
            "use --scoring greedy, or ask a classification task with --tasks",
        )
    say_open_tasks(recipe.eval.scoring, tasks)


def check_rows(run: RunDir, tasks: Sequence[Task]) -> None:
    """Check that the rows of tasks are those the run was made with.

    Raises:
        DataError: a task's are others.
    """
    known = run.info.extra.get("data", {})
    for task in tasks:
        if known.get(task.name) != task.fingerprint:
            raise DataError(
                f"the rows of task {task.name} are not those of the run",
                "give the run's own data with --data",
            )


def _cells(
    prepared: Prepared, trained: list[Place], answering: Place | None, request: EvalRequest
) -> list[Cell]:
    """Measure the cells, each adapter loaded when its turn comes."""
    evaluator, method = prepared.evaluator, prepared.method
    name, split = request.adapter, request.split
    if answering is None and method.answer != "more":
        return evaluator.cells(_own(prepared, trained, request))
    cells: list[Cell] = []
    by_name = {place[1]: place for place in trained}
    groups = (
        [(answering, prepared.tasks)]
        if answering
        else [(by_name[task.name], [task]) for task in prepared.tasks]
    )
    for place, tasks in groups:
        # By the method itself: what answers may be more than one LoRA.
        method.install(Finished(evaluator.run, trained[: trained.index(place) + 1]))
        identity = snapshot_hash(load_adapter(evaluator.run, *place))
        cells += evaluator.cells(
            Asked(place[1], task, name, identity, place, split) for task in tasks
        )
    return cells


def _own(prepared: Prepared, trained: list[Place], request: EvalRequest) -> Iterator[Asked]:
    """Yield each task's question to its own adapter; several answer in one batch."""
    run = prepared.evaluator.run
    by_name = {place[1]: place for place in trained}
    for task in prepared.tasks:
        snapshot = load_adapter(run, *by_name[task.name])
        place = since(run, by_name[task.name])
        identity = snapshot_hash(snapshot)
        yield Asked(place[1], task, request.adapter, identity, place, request.split, snapshot)
