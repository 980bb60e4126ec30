"""Where TreeLoRA's adapter starts a task: the mean of the group of tasks it resembles.

At the common seeded start (A as drawn once, B = 0) only B has a gradient, and all tasks' B
gradients share one gauge: they can be compared. The nearest earlier task by that gradient names
the group, its leaf's parent in the gradient tree, and the group's mean change of the weights is
what the new task starts from, cut to the adapter's rank (the averages of A and B apart would be
the change of no task at all).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.methods.base import StoredTask, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.change import mean_change
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.signatures import SignatureBank

GRADIENT = "start_gradient"


class GroupStart:
    """Starts each task from the group it resembles, and remembers what that takes.

    Args:
        model: its live adapter is started.
        batches: steps' rows that the B gradient is taken of.
    """

    def __init__(self, model: AdaptedModel, batches: int) -> None:
        self.model = model
        self.batches = batches
        widths = [sum(p.numel() for p in block.B) for block in model.blocks]
        self.bank = SignatureBank.empty(widths)
        self.gradient = torch.zeros(self.bank.entries)

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Take up the earlier tasks' gradients.

        Raises:
            RunDirError: a task was stored without one.
        """
        for task in finished:
            stored = task.memory.tensors.get(GRADIENT)
            if stored is None:
                raise RunDirError(
                    f"task {task.name} was stored without its start gradient",
                    "put its folder back from a copy, or start a new run",
                )
            self._add(task.name, stored)

    def begin(
        self,
        task: TaskContext,
        tree: GradientTree | None,
        snapshots: Sequence[Callable[[], Snapshot]],
    ) -> tuple[int, ...]:
        """Set the live adapter to its start; return the tasks of the group it came from.

        Args:
            task: the new task.
            tree: the tree of earlier tasks, if there are any.
            snapshots: read the earlier tasks' adapters.
        """
        self.model.reset()
        everything = dict(
            zip(map(id, self.model.parameters()), task.probe(self.batches), strict=True)
        )
        ups = [p for block in self.model.blocks for p in block.B]
        self.gradient = torch.cat([everything[id(p)].reshape(-1) for p in ups]).float().cpu()
        if tree is None:
            return ()
        group = group_of(tree, nearest_by_start(self.bank, self.gradient))
        self.model.restore(mean_change([snapshots[member]() for member in group]))
        return group

    def end(self, name: str) -> dict[str, Tensor]:
        """Return what to store of the finished task, and remember it."""
        self._add(name, self.gradient)
        return {GRADIENT: self.gradient}

    def _add(self, name: str, gradient: Tensor) -> None:
        self.bank = self.bank.add(name, gradient, torch.zeros(self.bank.blocks))


def group_of(tree: GradientTree, task: int) -> tuple[int, ...]:
    """Return the tasks of the smallest group that holds a task and another, or the task alone."""
    path = tree.path_to(task)
    return tree.nodes[path[-2]].tasks if len(path) > 1 else (task,)


def nearest_by_start(bank: SignatureBank, gradient: Tensor) -> int:
    """Return the task whose B gradient at the common start is nearest, ties to the earlier one.

    Args:
        bank: the stored tasks' B gradients.
        gradient: [F_B], the new task's.
    """
    return int(bank.xi_all(gradient.cpu(), bank.scales()).argmin())
