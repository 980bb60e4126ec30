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
from treelora_cli.models.adapted import AdaptedModel, Snapshot
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.signatures import SignatureBank

GRADIENT = "start_gradient"
A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"


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


def mean_change(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Return the adapter nearest to the mean weight change of several adapters.

    For every module the mean of B_i A_i is cut to the adapters' rank by a singular value
    decomposition, taken of the concatenated factors, so that no [d_out, d_in] matrix is made.

    Args:
        snapshots: adapters of the same shapes, at least one, keyed as PEFT saves them.

    Returns:
        An adapter of those shapes whose factors share the singular values evenly.
    """
    mean: Snapshot = {}
    for key in snapshots[0]:
        if key.endswith(A_KEY):
            other = key.removesuffix(A_KEY) + B_KEY
            downs = [snapshot[key] for snapshot in snapshots]
            ups = [snapshot[other] for snapshot in snapshots]
            mean[key], mean[other] = _cut(downs, ups)
    return {key: mean[key] for key in snapshots[0]}


def _cut(downs: list[Tensor], ups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A [r, d_in] and B [d_out, r] with B A the best rank-r fit to mean(B_i A_i)."""
    rank = downs[0].shape[0]
    left, upper = torch.linalg.qr(torch.cat(ups, dim=1).double() / len(ups))
    right, lower = torch.linalg.qr(torch.cat(downs).double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:rank].sqrt()
    B = (left @ u[:, :rank]) * root
    A = root[:, None] * (vh[:rank] @ right.T)
    # The signs of singular vectors are free; fixing them makes the start a function of its inputs.
    peaks = A.gather(1, A.abs().argmax(1, keepdim=True)).squeeze(1)
    signs = torch.where(peaks < 0, -1.0, 1.0).double()
    return _padded(A * signs[:, None], rank, 0), _padded(B * signs, rank, 1)


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Fill up with zeros where a module is narrower than the adapter's rank."""
    missing = rank - matrix.shape[dim]
    if missing > 0:
        shape = list(matrix.shape)
        shape[dim] = missing
        matrix = torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
    return matrix.float().contiguous()
