"""What a stream would do, without doing it: tasks, steps, sizes, and rows that would be cut."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treelora_cli.engine.building import check_building
from treelora_cli.engine.drive import check_drive
from treelora_cli.engine.memory import Group, free_memory, training_need
from treelora_cli.engine.opening import load_stream_tasks
from treelora_cli.engine.world import World
from treelora_cli.methods.base import Method, build_method
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.models.outline import Outline, outline
from treelora_cli.models.sharded import trained_base
from treelora_cli.recipe import Recipe
from treelora_cli.rundir.checkpoints import KEEP
from treelora_cli.rundir.layout import RunDir
from treelora_cli.tasks.types import Task


@dataclass(frozen=True)
class PlannedTask:
    """One task of a planned stream.

    Attributes:
        name: the task.
        status: ``finished`` tasks are skipped.
        rows: training rows.
        test_rows: rows of the test split.
        epochs: passes over the rows; 0 where the method trains nothing.
        steps: optimizer steps, those on rows of earlier tasks counted.
        tokens: tokens of one pass, as cut.
        longest: tokens of the longest training row, as cut.
        cut: rows whose prompt or answer would be cut.
        metric: how answers are scored.
    """

    name: str
    status: str
    rows: int
    test_rows: int
    epochs: int
    steps: int
    tokens: int
    longest: int
    cut: int
    metric: str


@dataclass(frozen=True)
class Plan:
    """A planned stream; sizes in bytes.

    ``memory_bytes`` is that of each process. It holds the activations, a soft bound: see
    ``models.footprint``. A method's own memory (earlier adapters, statistics) is not in it.
    """

    method: str
    model: str
    device: str
    dtype: str
    processes: int
    parameters: int
    trainable_parameters: int
    memory_bytes: int
    activation_bytes: int
    memory_free_bytes: int | None
    disk_bytes: int
    disk_free_bytes: int
    tasks: tuple[PlannedTask, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def plan_stream(recipe: Recipe, path: Path, group: Group | None = None) -> Plan:
    """Check everything a run needs and say what it would do.

    Args:
        recipe: resolved.
        path: the run directory; nothing is written to it.
        group: the processes that would train together; None: as they were launched.

    Raises:
        TreeloraError: what the run itself would fail with before its first step.
    """
    group = group or Group.launched()
    method = build_method(recipe)
    world = World(size=group.size).under(recipe.processes.engine)
    check_drive(recipe.processes.engine, method, world)
    check_building(recipe, world)
    tasks = load_stream_tasks(recipe, recipe.stream.tasks)
    sizes = outline(recipe.model, recipe.lora, method.learns)
    if world.sharded and sizes.opened:
        raise trained_base()
    encoder = encoder_for(sizes.tokenizer, recipe.data, sizes.positions, encodes=sizes.encodes)
    status = _status(path)
    planned = tuple(
        _planned(task, encoder, status.get(task.name, "new"), work)
        for task, work in zip(tasks, _work(method, recipe, tasks), strict=True)
    )
    need = training_need(sizes, recipe, max(task.longest for task in planned), group)
    return Plan(
        method=method.name,
        model=recipe.model.name or "built-in base (synthetic)",
        device=sizes.device,
        dtype=sizes.dtype,
        processes=group.size,
        parameters=sizes.parameters,
        trainable_parameters=sizes.trainable,
        memory_bytes=need.total,
        activation_bytes=need.activations,
        memory_free_bytes=free_memory(sizes.device, group),
        disk_bytes=_disk(sizes, method, planned),
        disk_free_bytes=shutil.disk_usage(_existing(path)).free,
        tasks=planned,
    )


def _status(path: Path) -> dict[str, str]:
    if not (path / "run.json").exists():
        return {}
    return {entry["name"]: entry["status"] for entry in RunDir.open(path).info.tasks}


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _work(method: Method, recipe: Recipe, tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """Return the epochs and optimizer steps of every task."""
    if not method.trains:
        return [(0, 0) for _ in tasks]
    size = recipe.optim.batch_size
    rows = [len(task.splits["train"]) for task in tasks]
    found = []
    for number, task in enumerate(tasks):
        epochs = recipe.epochs_of(task.name)
        rehearsed = method.rehearsal_size(rows[:number])
        found.append((epochs, epochs * -(-rows[number] // size) + -(-rehearsed // size)))
    return found


def _planned(task: Task, encoder: Encoder, status: str, work: tuple[int, int]) -> PlannedTask:
    rows = task.splits["train"]
    examples = [encoder.example(row.prompt, row.answer, task.separator) for row in rows]
    return PlannedTask(
        name=task.name,
        status=status,
        rows=len(rows),
        test_rows=len(task.splits["test"]),
        epochs=work[0],
        steps=work[1],
        tokens=sum(len(example.tokens) for example in examples),
        longest=max(len(example.tokens) for example in examples),
        cut=sum(example.truncated for example in examples),
        metric=task.metric,
    )


def _disk(sizes: Outline, method: Method, tasks: Sequence[PlannedTask]) -> int:
    """What the tasks still to come leave, and the newest checkpoints.

    Rows and statistics that a method keeps are left out. A sum's rank grows with every task.
    """
    left = [number for number, task in enumerate(tasks) if task.status != "finished"]
    times = [number + 1 if method.answer == "sum" else 1 for number in left]
    checkpoints = KEEP * sizes.checkpoint_bytes if any(task.steps for task in tasks) else 0
    return sizes.stored_bytes * sum(times) + checkpoints
