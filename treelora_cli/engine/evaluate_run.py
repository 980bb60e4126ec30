"""Score a run's adapters again, or in another way: the `eval` command's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.engine.evaluation import Asked, Evaluator
from treelora_cli.engine.opening import check_base, load_stream_tasks
from treelora_cli.engine.plan import pick
from treelora_cli.engine.signals import StopFlag
from treelora_cli.engine.store import load_adapter, snapshot_hash
from treelora_cli.errors import DataError, RunDirError, UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import Recipe, build_recipe, read_yaml
from treelora_cli.rundir.atomic import committed
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.lock import RunLock
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.tasks.types import Task

Place = tuple[int, str]


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        adapter: ``latest``, ``own`` or ``task:NAME``.
        tasks: names, or None for every trained task.
        split: ``test`` or ``eval``.
        limit: rows a task; None for all that the run uses.
        batch_size: prompts a batch; None for the recipe's.
        model: where the base is now, if it moved.
        data: where the tasks are now, if they moved.
    """

    adapter: str = "latest"
    tasks: Sequence[str] | None = None
    split: str = "test"
    limit: int | None = None
    batch_size: int | None = None
    model: str | None = None
    data: str | None = None


def evaluate_run(
    path: Path, request: EvalRequest, show: Callable[[dict[str, Any]], None]
) -> list[Cell]:
    """Evaluate a run's adapters; cells that are known already are not computed again.

    Args:
        path: the run directory.
        request: what to evaluate.
        show: told of every new cell.

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
    names = pick(learned, _listed(request.tasks), "task")
    recipe = _recipe(run, request)
    with StopFlag() as stop, RunLock(path):
        tasks = load_stream_tasks(recipe, names)
        _check_tasks(run, tasks)
        backbone = load_backbone(recipe.model)
        check_base(run, backbone)
        adapted = AdaptedModel(backbone, recipe.lora, recipe.stream.seed)
        log = EventLog(run.events)
        evaluator = Evaluator(
            adapted=adapted,
            data=recipe.data,
            batch_size=request.batch_size or recipe.eval.batch_size,
            run=run,
            scores=Scores.load(run.scores),
            limited=recipe.limit is not None,
            emit=lambda kind, fields: show(log.append(kind, sync=True, **fields)),
            stop=stop,
        )
        return _cells(evaluator, tasks, trained, answering, request)


def trained_tasks(run: RunDir) -> list[Place]:
    """Return index and name of every task whose folder is committed, in stream order.

    Raises:
        RunDirError: there is none yet.
    """
    places = [(entry["index"], entry["name"]) for entry in run.info.tasks]
    trained = [place for place in places if committed(run.task_dir(*place)) is not None]
    if not trained:
        raise RunDirError(f"{run.path} has no trained task yet", "train one with train-stream")
    return trained


def _listed(names: Sequence[str] | None) -> list[str] | None:
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
    raise UsageError(f"unknown adapter {adapter!r}", "use latest, own or task:NAME")


def _refuse_own(adapter: str) -> None:
    if adapter == "own":
        raise UsageError(
            "the tasks of this run were trained at once: none has an adapter of its own",
            "use --adapter latest",
        )


def _recipe(run: RunDir, request: EvalRequest) -> Recipe:
    text = run.recipe_yaml.read_text(encoding="utf-8")
    recipe = build_recipe(read_yaml(text, str(run.recipe_yaml)), str(run.recipe_yaml))
    data, model = recipe.data, recipe.model
    if request.data is not None:
        data = data.model_copy(update={"path": request.data})
    if request.model is not None:
        model = model.model_copy(update={"name": request.model})
    limit = request.limit or recipe.limit
    return recipe.model_copy(update={"data": data, "model": model, "limit": limit})


def _check_tasks(run: RunDir, tasks: Sequence[Task]) -> None:
    known = run.info.extra.get("data", {})
    for task in tasks:
        if known.get(task.name) != task.fingerprint:
            raise DataError(
                f"the rows of task {task.name} are not those of the run",
                "give the run's own data with --data",
            )


def _cells(
    evaluator: Evaluator,
    tasks: Sequence[Task],
    trained: list[Place],
    answering: Place | None,
    request: EvalRequest,
) -> list[Cell]:
    cells = []
    loaded: Place | None = None
    answering_hash = ""
    by_name = {place[1]: place for place in trained}
    for task in tasks:
        place = answering or by_name[task.name]
        if place != loaded:
            snapshot = load_adapter(evaluator.run, *place)
            evaluator.adapted.restore(snapshot)
            loaded, answering_hash = place, snapshot_hash(snapshot)
        cells.append(
            evaluator.cell(
                Asked(place[1], task, request.adapter, answering_hash, place, request.split)
            )
        )
    return cells
