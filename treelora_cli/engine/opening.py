"""Open or create a run directory for writing: load, compare with what was there, lock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treelora_cli.engine.alike import check_same_inputs, check_same_recipe
from treelora_cli.engine.building import build_model, check_building
from treelora_cli.engine.drive import check_drive
from treelora_cli.engine.environment import versions
from treelora_cli.engine.merging import tidy
from treelora_cli.engine.plan import check_tasks
from treelora_cli.engine.shortage import explaining_shortage, foresee, training_hint
from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import DataError, UsageError
from treelora_cli.methods.base import Method, StreamContext, build_method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import Backbone
from treelora_cli.models.encode import encoder_for
from treelora_cli.models.packing import require_packing
from treelora_cli.models.sharded import check_base_is_left_alone
from treelora_cli.models.soft import require_condition
from treelora_cli.recipe import Recipe
from treelora_cli.rundir.atomic import write_file
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.lock import RunLock
from treelora_cli.rundir.runinfo import RunInfo
from treelora_cli.tasks.load import limit_rows, load_tasks
from treelora_cli.tasks.types import Task

# The rows kept by data.train_rows and data.test_rows are the same for every seed of a run, so that
# runs that differ in their seed are scored on the same questions.
ROW_SEED = 0


@dataclass(frozen=True)
class Opened:
    """Everything a stream needs; the method has met the model.

    Attributes:
        lock: held; None in processes other than the first, which write nothing.
    """

    lock: RunLock | None
    run: RunDir
    recipe: Recipe
    tasks: list[Task]
    adapted: AdaptedModel
    method: Method
    world: World = ALONE


def load_stream_tasks(recipe: Recipe, names: Sequence[str]) -> list[Task]:
    """Load tasks with the recipe's row limits applied.

    Raises:
        UsageError: an unknown task.
        DataError: rows that cannot be used.
    """
    data = recipe.data
    train = _least(data.train_rows, recipe.limit)
    test = _least(data.test_rows, recipe.limit)
    return [limit_rows(task, train, test, ROW_SEED) for task in load_tasks(names, data.path)]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


@contextmanager
def open_for_training(recipe: Recipe, path: Path, world: World = ALONE) -> Iterator[Opened]:
    """Load data, model and method, then open or create the run directory and lock it.

    A new run directory is made only when everything it needs has been loaded.

    Args:
        recipe: resolved; names all tasks of the run, old and new.
        path: the run directory.
        world: the processes that open it together; the first creates and locks it.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    check_same_recipe(recipe, world)
    method = build_method(recipe)
    world = world.under(recipe.processes.engine)
    check_drive(recipe.processes.engine, method, world)
    exists = (path / "run.json").exists()
    check_building(recipe, world)
    if not world.first:
        tasks = load_stream_tasks(recipe, recipe.stream.tasks)
        adapted = _load_model(recipe, method, tasks, world)
        world.wait()
        yield Opened(None, RunDir.open(path), recipe, tasks, adapted, method, world)
        return
    if exists:
        RunDir.open(path)
        with RunLock(path) as lock:
            opened = _load(lock, recipe, path, method, world)
            world.wait()
            yield opened
        return
    tasks = load_stream_tasks(recipe, recipe.stream.tasks)
    adapted = _load_model(recipe, method, tasks, world)
    with RunLock(path, create=True) as lock:
        run = RunDir.create(path, _new_info(recipe, method, adapted.backbone), recipe.to_yaml())
        _add_tasks(run, tasks)
        world.wait()
        yield Opened(lock, run, recipe, tasks, adapted, method, world)


def _load(lock: RunLock, recipe: Recipe, path: Path, method: Method, world: World) -> Opened:
    run = RunDir.open(path)
    run.sweep()
    tidy(run)
    tasks = load_stream_tasks(recipe, recipe.stream.tasks)
    _check_data(run, tasks)
    adapted = _load_model(recipe, method, tasks, world)
    check_base(run, adapted.backbone)
    write_file(run.recipe_yaml, recipe.to_yaml())
    _add_tasks(run, tasks)
    return Opened(lock, run, recipe, tasks, adapted, method, world)


def append_task(run: RunDir, recipe: Recipe, name: str) -> tuple[Recipe, Task]:
    """Add one more task to a run that is open.

    Returns:
        The recipe with the task in its stream, and the task.

    Raises:
        UsageError: an unknown or bad name, or a task without its number of epochs.
        DataError: rows that cannot be used.
    """
    names = (*recipe.stream.tasks, name)
    check_tasks(list(names), recipe)
    task = load_stream_tasks(recipe, [name])[0]
    stream = recipe.stream.model_copy(update={"tasks": names})
    longer = recipe.model_copy(update={"stream": stream})
    write_file(run.recipe_yaml, longer.to_yaml())
    run.info.add_task(task.name, task.metric)
    run.info.extra["data"][task.name] = task.fingerprint
    run.save_info()
    return longer, task


def _load_model(
    recipe: Recipe, method: Method, tasks: Sequence[Task], world: World
) -> AdaptedModel:
    """Load the model and let recipe and method meet it, since they may not fit its shape."""
    forecast = foresee(recipe, method, tasks)
    if forecast is not None:
        forecast.warn()
    with explaining_shortage("loading the model", partial(training_hint, recipe, method, tasks)):
        adapted = build_model(recipe, method, world)
    backbone = adapted.backbone
    encoder_for(backbone.tokenizer, recipe.data, backbone.positions, encodes=backbone.encodes)
    if recipe.optim.packing:
        require_packing(adapted)
    check_same_inputs(tasks, backbone, world)
    start_method(method, recipe, adapted)
    if world.sharded:
        check_base_is_left_alone(adapted)
    require_condition(adapted, recipe.data, packing=recipe.optim.packing)
    return adapted


def new_method(recipe: Recipe, adapted: AdaptedModel) -> Method:
    """Return the recipe's method, having met the model and no task yet."""
    method = build_method(recipe)
    start_method(method, recipe, adapted)
    return method


def start_method(method: Method, recipe: Recipe, adapted: AdaptedModel) -> None:
    """Let a method meet the model.

    Raises:
        UsageError: the recipe asks for what the method cannot give.
    """
    if method.answer != "adapter" and recipe.storage.max_adapters is not None:
        grows = "an adapter whose rank grows" if method.answer == "sum" else "more than LoRA"
        raise UsageError(
            f"storage.max_adapters merges adapters of one rank; {method.name} answers with {grows}",
            "leave storage.max_adapters out",
        )
    stream = StreamContext(recipe.stream.seed, recipe.bandit, recipe.tree, recipe.lora, recipe.data)
    method.start(stream, adapted)


def check_base(run: RunDir, backbone: Backbone) -> None:
    """Check that the base is the one the run was made with.

    Raises:
        UsageError: its weights are others.
    """
    if run.info.base_fingerprint != backbone.fingerprint:
        raise UsageError(
            f"the run was made with the base {run.info.model!r} "
            f"({run.info.base_fingerprint[:23]}...), not with {backbone.name!r} "
            f"({backbone.fingerprint[:23]}...)",
            "give the run's own base with --model, or another --run-dir",
        )


def _check_data(run: RunDir, tasks: Sequence[Task]) -> None:
    known = run.info.extra.get("data", {})
    for task in tasks:
        if known.get(task.name, task.fingerprint) != task.fingerprint:
            raise DataError(
                f"the rows of task {task.name} are not those the run was begun with",
                "put the data back as they were, or give another --run-dir",
            )


def _new_info(recipe: Recipe, method: Method, backbone: Backbone) -> RunInfo:
    return RunInfo(
        method=method.name,
        model=backbone.name,
        base_fingerprint=backbone.fingerprint,
        builtin_base=backbone.builtin,
        builtin_data=recipe.data.path is None,
        seed=recipe.stream.seed,
        versions=versions(),
        extra={
            "mode": method.mode,
            "answer": method.answer,
            "decoding": recipe.eval.scoring,
            "data": {},
        },
    )


def _add_tasks(run: RunDir, tasks: Sequence[Task]) -> None:
    for task in tasks[len(run.info.tasks) :]:
        run.info.add_task(task.name, task.metric)
        run.info.extra["data"][task.name] = task.fingerprint
    run.info.extra["command"] = _command(run)
    run.save_info()


def _command(run: RunDir) -> list[str]:
    """The command that repeats the run from its own recipe, wherever it is copied to."""
    return [
        "treelora",
        "train-stream",
        "--recipe",
        str(run.recipe_yaml),
        "--run-dir",
        f"{run.path}-again",
    ]
