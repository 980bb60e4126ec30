"""What GEM and A-GEM share: rows of every finished task whose gradients bound the next updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.methods._memory import Memory, sample_rows
from treelora_cli.methods.base import (
    EFFECT,
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.readback import Readback

Drawn = Annotated[int, Field(gt=0)] | Literal["all"]


class EpisodicSettings(MethodSettings):
    """Settings of a method with an episodic memory."""

    rows: Annotated[int, Field(gt=0)] = Field(
        256, description="training rows that are kept of every finished task, chosen at random"
    )


class Episodic(Method):
    """A method that keeps rows of every finished task and changes gradients by them."""

    needs = frozenset({"gradients"})
    Settings = EpisodicSettings
    settings: EpisodicSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with no memory."""
        super().start(stream, model)
        self.memories: list[Memory] = []
        self.observed: dict[str, Any] = {}

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read the rows of all finished tasks back.

        Raises:
            RunDirError: a task's rows are missing or damaged.
        """
        self.memories = [Memory.from_tensors(task.memory.tensors, task.name) for task in finished]

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the last task's weights."""
        self.task = task
        self.observed = {}

    def observe(self, taken: Tensor | float, **more: object) -> None:
        """Note what this step's event shows.

        Args:
            taken: norm of what was added to the step's gradient.
            more: further values.
        """
        effect = Readback(taken) if isinstance(taken, Tensor) else taken
        self.observed = {EFFECT: effect, **more}

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report by how much the step's gradient was changed."""
        return self.observed

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Keep some of the task's rows."""
        memory = Memory(sample_rows(task.rows, self.settings.rows, task.seed))
        self.memories.append(memory)
        return TaskMemory(memory.tensors(), {"rows_kept": len(memory)})


def most(drawn: int | Literal["all"], rows: int) -> int:
    """Return how many of so many rows a step reads at the most."""
    return rows if drawn == "all" else drawn


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Return the parameters' gradients; zero where the loss does not depend on one."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def gram_matrix(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the inner products of vectors that are each spread over tensors.

    Args:
        vectors: K of them, each the same shapes in the same order.

    Returns:
        float64 [K, K], on their device. Products are formed in float64: where two gradients are
        nearly orthogonal, float32 would not tell the sign.
    """
    total: Tensor | None = None
    for parts in zip(*vectors, strict=True):
        rows = torch.stack([part.reshape(-1) for part in parts]).double()
        total = rows @ rows.T if total is None else total + rows @ rows.T
    if total is None:
        raise ValueError("no vectors")
    return total
