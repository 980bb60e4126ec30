"""Experience replay: rows of earlier tasks are trained on again.

``way: reservoir`` is the classic form (Chaudhry et al. 2019, "On Tiny Episodic Memories in
Continual Learning"): a reservoir holds ``rows`` rows, each row of all earlier tasks equally likely
(Vitter 1985); every step draws ``ratio`` of them for each row of its own, and the loss is the mean
over both. Up to a factor of the whole gradient that is

    L = L_new + (m / n) L_drawn

with n new and m drawn rows, L_new and L_drawn mean cross-entropies of answer tokens.

``way: trace`` is that of TRACE (Wang et al. 2023): when a task's own epochs are through, one more
epoch over the first ``share`` of the training rows of each earlier task, shuffled together.

Stored per task: reservoir: the whole reservoir as it is after the task; trace: the task's first
rows. Cost: reservoir: 1 + ``ratio`` times that of plain LoRA from the second task on, whatever
their number, and the memory of the drawn rows' pass beside the step's own last one; trace: steps
that grow with the number of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from treelora_cli.methods._memory import Memory, reservoir
from treelora_cli.methods._replay import joined_loss
from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example

SEEN = "rows_seen"


class ReplaySettings(MethodSettings):
    """Replay's own settings."""

    way: Literal["reservoir", "trace"] = Field(
        "reservoir",
        description="rows drawn from a reservoir in every step; or one more epoch over earlier "
        "tasks' first rows after a task's own epochs, as TRACE does",
    )
    rows: Annotated[int, Field(gt=0)] = Field(500, description="reservoir: its places")
    ratio: Annotated[float, Field(gt=0)] = Field(
        1.0, description="reservoir: rows drawn for each row of a step"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="trace: share of every earlier task's training rows"
    )


class Replay(Method):
    """Rows of earlier tasks trained again: with every step, or after a task."""

    name = "replay"
    needs = frozenset({"penalty"})
    Settings = ReplaySettings
    settings: ReplaySettings
    departures = (
        Departure(
            "what is trained",
            "all weights (TRACE and the classic form)",
            "all weights",
            "the LoRA adapter, which goes on from task to task",
        ),
        Departure(
            "general data (trace)",
            "all of LIMA's 1,000 rows with the rows of earlier tasks, after the first task too",
            "as the paper",
            "rows of earlier tasks alone, so that nothing is rehearsed after the first task",
        ),
        Departure(
            "when rows enter the memory (reservoir)",
            "as they are trained on, so that a task replays its own rows too",
            "as the paper",
            "when their task ends",
        ),
        Departure(
            "weight of what is drawn (reservoir)",
            "the mean over a step's new and drawn rows",
            "as the paper",
            "the new rows' mean and m/n of the drawn ones': the same direction, 1 + m/n the size",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with no memory."""
        super().start(stream, model)
        self.memories: list[Memory] = []
        self.seen = 0

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read the rows back.

        Raises:
            RunDirError: a task's rows are missing or damaged.
        """
        # The last reservoir holds what is left of all earlier ones.
        needed = finished if self.settings.way == "trace" else finished[-1:]
        self.memories = [Memory.from_tensors(task.memory.tensors, task.name) for task in needed]
        self.seen = int(finished[-1].memory.info[SEEN]) if finished else 0

    def rehearsal(self, index: int) -> Sequence[Example]:
        """Return the first rows of each earlier task, in TRACE's way."""
        if self.settings.way == "reservoir":
            return ()
        return [row for memory in self.memories for row in memory.rows]

    def rehearsal_size(self, earlier: Sequence[int]) -> int:
        """Return how many rows are rehearsed."""
        return sum(map(self._first, earlier)) if self.settings.way == "trace" else 0

    def _first(self, rows: int) -> int:
        """Return how many of a task's rows are kept in TRACE's way."""
        return math.ceil(self.settings.share * rows)

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the last task's weights."""
        self.task = task

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return the loss of the rows drawn for this step, weighted."""
        if self.settings.way == "trace" or not self.memories:
            return None
        return joined_loss(self.task, self.memories[-1].rows, self.settings.ratio, step.step)

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Take the task's rows into the memory."""
        if self.settings.way == "trace":
            self.memories.append(Memory(list(task.rows[: self._first(len(task.rows))])))
        else:
            held = self.memories[-1].rows if self.memories else []
            rows = reservoir(held, self.seen, task.rows, self.settings.rows, task.seed)
            self.memories = [Memory(rows)]
        self.seen += len(task.rows)
        info: dict[str, Any] = {"rows_kept": len(self.memories[-1]), SEEN: self.seen}
        return TaskMemory(self.memories[-1].tensors(), info)
