"""What a stream would do, without doing it: tasks, steps, sizes, and rows that would be cut."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treelora_cli.engine.forwards import pass_tokens
from treelora_cli.engine.opening import load_stream_tasks
from treelora_cli.methods.base import build_method
from treelora_cli.models.backbone import choose_device
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.models.outline import Outline, outline
from treelora_cli.recipe import Recipe
from treelora_cli.rundir.layout import RunDir
from treelora_cli.tasks.types import Task

# A checkpoint holds the adapter and two Adam moments; the two newest are kept.
CHECKPOINT_ADAPTERS = 2 * 3


@dataclass(frozen=True)
class PlannedTask:
    """One task of a planned stream.

    Attributes:
        name: the task.
        status: ``finished`` tasks are skipped.
        rows: training rows.
        test_rows: rows of the test split.
        epochs: passes over the rows.
        steps: optimizer steps.
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
    """A planned stream; sizes in bytes."""

    method: str
    model: str
    device: str
    dtype: str
    parameters: int
    trainable_parameters: int
    memory_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    tasks: tuple[PlannedTask, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def plan_stream(recipe: Recipe, path: Path) -> Plan:
    """Check everything a run needs and say what it would do.

    Args:
        recipe: resolved.
        path: the run directory; nothing is written to it.

    Raises:
        TreeloraError: what the run itself would fail with before its first step.
    """
    method = build_method(recipe)
    tasks = load_stream_tasks(recipe, recipe.stream.tasks)
    sizes = outline(recipe.model, recipe.lora)
    encoder = encoder_for(sizes.tokenizer, recipe.data, sizes.positions)
    status = _status(path)
    planned = tuple(_planned(task, recipe, encoder, status.get(task.name, "new")) for task in tasks)
    left = [task for task in planned if task.status != "finished"]
    return Plan(
        method=method.name,
        model=recipe.model.name or "built-in base (synthetic)",
        device=sizes.device,
        dtype=sizes.dtype,
        parameters=sizes.parameters,
        trainable_parameters=sizes.trainable,
        memory_bytes=_memory(sizes, recipe, planned),
        disk_bytes=sizes.adapter_bytes * (len(left) + CHECKPOINT_ADAPTERS),
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


def _planned(task: Task, recipe: Recipe, encoder: Encoder, status: str) -> PlannedTask:
    rows = task.splits["train"]
    examples = [encoder.example(row.prompt, row.answer, task.separator) for row in rows]
    epochs = recipe.epochs_of(task.name)
    return PlannedTask(
        name=task.name,
        status=status,
        rows=len(rows),
        test_rows=len(task.splits["test"]),
        epochs=epochs,
        steps=epochs * -(-len(rows) // recipe.optim.batch_size),
        tokens=sum(len(example.tokens) for example in examples),
        longest=max(len(example.tokens) for example in examples),
        cut=sum(example.truncated for example in examples),
        metric=task.metric,
    )


def _memory(sizes: Outline, recipe: Recipe, tasks: tuple[PlannedTask, ...]) -> int:
    """Weights, adapter with gradients and Adam moments, and the logits of one forward pass.

    Activations of the layers are left out: they depend on kernels. The estimate is a lower bound.
    """
    optim, longest = recipe.optim, max(task.longest for task in tasks)
    answer = min(recipe.data.max_answer_tokens, longest) + 1
    device = choose_device(recipe.model.device).type
    fitting = max(1, (pass_tokens(optim, device) or longest * optim.batch_size) // longest)
    rows = min(optim.micro_batch_size, optim.batch_size, fitting)
    logits = rows * answer * len(sizes.tokenizer) * 4 * 2
    return sizes.training_bytes + logits
