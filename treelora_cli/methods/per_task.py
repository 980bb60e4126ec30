"""Per-task LoRA: a fresh adapter for every task, each answering for its own; the ceiling.

Source: PerTaskFT of the O-LoRA benchmark (Wang et al., 2023), with LoRA. Nothing is shared between
tasks, so nothing is forgotten, but the task of every question has to be known. Stored per task:
the adapter. Cost per step: that of plain LoRA.
"""

from __future__ import annotations

from treelora_cli.methods.base import Method, TaskContext


class PerTask(Method):
    """An independent LoRA adapter for each task, all from the same seeded start."""

    name = "per-task"
    mode = "own"

    def begin_task(self, task: TaskContext) -> None:
        """Start from A as drawn once for the run, and B = 0."""
        self.model.reset()
