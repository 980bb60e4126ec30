"""The arithmetic of the released TreeLoRA code, oddities included, on plain tensors.

Source: the authors' repository (Qian et al., ICML 2025), ``utils/kd_lora_tree.py``, commit
c6a9b6d; recorded inputs and outputs of it are in ``tests/data/treelora_official.json``.

N earlier tasks, L rows (one per LoRA A matrix), D values a row; T rounds (forward passes) an epoch,
t the round, from 0. What the code calls a gradient is the value of the A matrices. Everything is
float32; where the code depends on the dtype (its running sum stalls in bfloat16) this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.errors import DivergedError
from treelora_cli.tree.groups import member_distances
from treelora_cli.tree.nodes import GradientTree, Group
from treelora_cli.tree.signatures import SignatureBank

GUARD = 1e-5
"""What the code adds to every divisor."""

LARGEST_FACTOR = 1.5
"""No group's scores are multiplied by more; there is no bound below."""


@dataclass(frozen=True, slots=True, eq=False)
class OfficialNode:
    """A group of tasks in the released code's tree.

    Attributes:
        tasks: the group, in the order it came in.
        depth: distance from the root, and the row that cuts the group.
        median: the lower median of the members' dot products with their mean; None for a leaf.
        mean: the members' mean row, float32 [D]; None for a leaf.
        by_position: one side of the median was empty, so the list was cut in half instead.
        children: left and right; empty for a leaf.
    """

    tasks: tuple[int, ...]
    depth: int
    median: float | None = None
    mean: Tensor | None = None
    by_position: bool = False
    children: tuple[OfficialNode, ...] = ()


def accumulate(running: Tensor, matrix: Tensor, rounds: int) -> Tensor:
    """Return the running vector after one more round, [L, D].

    The code adds 1/T of the whole matrix once per row, hence the factor L.

    Args:
        running: [L, D], zero at the start of an epoch.
        matrix: [L, D], the A matrices now.
        rounds: T.
    """
    return running + matrix.detach().float() * (matrix.shape[0] / rounds)


def strength(reg: float, number: int, rounds: int) -> float:
    """Return reg t / T: zero at the start of every epoch, nearly ``reg`` at its end."""
    return reg * number / rounds


def differences(stored: Tensor) -> Tensor:
    """Return what the tree is built on, [N, L, D]: task 0 itself, then task k minus task k - 1."""
    return torch.cat([stored[:1], stored[1:] - stored[:-1]])


def build(features: Tensor, tasks: Sequence[int], levels: int, depth: int = 0) -> OfficialNode:
    """Build the tree of some tasks from nothing; level d looks at row d alone.

    Dot products with the group's mean at or above their lower median go left, the others right;
    where that leaves a side empty, as it does for two tasks, the list is cut by position.

    Args:
        features: [N, L, D], from :func:`differences`.
        tasks: the group, in order.
        levels: how many levels may cut; a leaf below them may hold several tasks.
        depth: level of this group.
    """
    group = tuple(tasks)
    if len(group) <= 1 or depth >= levels:
        return OfficialNode(group, depth)
    rows = features[list(group), depth]
    mean = rows.mean(0)
    products = rows @ mean
    median = products.median()
    above = (products >= median).tolist()
    left = [task for task, high in zip(group, above, strict=True) if high]
    right = [task for task, high in zip(group, above, strict=True) if not high]
    by_position = not left or not right
    if by_position:
        half = len(group) // 2
        left, right = list(group[:half]), list(group[half:])
    children = tuple(build(features, side, levels, depth + 1) for side in (left, right))
    return OfficialNode(group, depth, float(median), mean, by_position, children)


def scores(similarity: Tensor, counts: Tensor, number: int, rounds: int) -> Tensor:
    """Return the table of scores [N, L]; a larger one is drawn more often.

    It is the negated lower confidence bound of a negated distance, hence distance plus bonus: far
    and rarely drawn tasks score most. The smallest entry is added to all, not taken off.

    Args:
        similarity: [N, L], minus the sum of the distances seen in this epoch.
        counts: [N, L], how often each task was drawn for each row in this epoch.
        number: t.
        rounds: T.
    """
    seen = torch.where(counts > 0, similarity / counts.clamp(min=1), similarity)
    bonus = math.sqrt(math.log(2 * rounds * (number + 1) * (number + 2)))
    table = -(seen - bonus / torch.sqrt(2 * counts + GUARD))
    return table + table.min()


def task_probabilities(table: Tensor) -> Tensor:
    """Return the distribution [N] of the first draw: a softmax of sums over all rows.

    The sums are so far apart that this is the arg max in practice.
    """
    return table.sum(1).softmax(0)


def row_probabilities(table: Tensor, tree: OfficialNode | None, first: int) -> Tensor:
    """Return the distribution of the second draw over tasks, one for each row: [N, L].

    The child of the root on the side of the first draw has its tasks' scores multiplied by its
    median, 1.5 at the most (1 for a leaf); nothing deeper in the tree matters. One range over all
    tasks and rows then brings the scores within 1 of each other, so that no task is ever drawn
    more than e times as often as another.

    Args:
        table: [N, L], from :func:`scores`.
        tree: over the N tasks; None counts as a tree without children.
        first: the task of the first draw.
    """
    if tree is not None and tree.children:
        left, right = tree.children
        child = left if first in left.tasks else right
        factor = 1.0 if child.median is None else min(child.median, LARGEST_FACTOR)
        table = table.clone()
        table[list(child.tasks)] *= factor
    return (table / (table.max() - table.min() + GUARD)).softmax(0)


def gather(stored: Tensor, selected: Tensor) -> Tensor:
    """Return row l of task ``selected[l]`` for every row, [L, D]."""
    return stored[selected, torch.arange(stored.shape[1])]


def regularizer(matrix: Tensor, targets: Tensor, loss: Tensor, weight: float) -> Tensor:
    """Return the scalar that the code takes off the loss, with its gradient.

    With s the sum over rows of the dot products of the matrix with its targets it is
    -s / (-s + 1e-5) loss reg t / T, divisor and loss constants: about loss reg t / T whatever s
    is, with the gradient of loss reg t / T log |s|.

    Where s is exactly 1e-5 the code divides by zero; here the divisor is then 1e-5, so that the
    value stays finite. The value at that point has no meaning in either.

    Args:
        matrix: [L, D], the live A matrices, in the graph.
        targets: [L, D], constants on the same device, from :func:`gather`.
        loss: the task loss of this forward pass.
        weight: reg t / T, from :func:`strength`.
    """
    raw = -(matrix.float() * targets).sum()
    divisor = raw.detach() + GUARD
    divisor = torch.where(divisor == 0, torch.full_like(divisor, GUARD), divisor)
    return raw / divisor * loss.detach() * weight


class OfficialSearch:
    """The draws of one task: statistics that start anew with every epoch.

    Args:
        stored: [N, L, D], the vectors kept of the earlier tasks, on the host.
        tree: over these tasks, or None.
        rounds: T.
    """

    def __init__(self, stored: Tensor, tree: OfficialNode | None, rounds: int) -> None:
        self.stored = stored
        self.tree = tree
        self.rounds = rounds
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget everything that was seen."""
        self.similarity = torch.zeros(self.stored.shape[:2])
        self.counts = torch.zeros(self.stored.shape[:2], dtype=torch.int64)

    def scores(self, number: int) -> Tensor:
        """Return the table of scores [N, L] of round t."""
        return scores(self.similarity, self.counts, number, self.rounds)

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw a task for every row: int64 [L].

        Args:
            number: t.
            generator: on the host; the code draws from torch's global generator instead.

        Raises:
            DivergedError: a distance seen before was not finite.
        """
        table = self.scores(number)
        if not bool(torch.isfinite(table).all()):
            raise DivergedError(
                "the distances to the earlier tasks are not finite numbers",
                "training has diverged: lower optim.lr or method.reg",
            )
        first = int(torch.multinomial(task_probabilities(table), 1, generator=generator))
        rows = row_probabilities(table, self.tree, first)
        return torch.multinomial(rows.T.contiguous(), 1, generator=generator).squeeze(1)

    def update(self, running: Tensor, selected: Tensor) -> None:
        """Count the drawn tasks and take the L1 distances to them off their similarity.

        The running vector is a part of an epoch's sum, the stored one a whole sum: early in an
        epoch the distance measures how long the stored one is.

        Args:
            running: [L, D], on any device.
            selected: [L].
        """
        targets = gather(self.stored, selected).to(running.device)
        distances = (running - targets).abs().sum(1).cpu()
        at = (selected, torch.arange(len(selected)))
        self.counts[at] += 1
        self.similarity[at] -= distances


def as_gradient_tree(root: OfficialNode, bank: SignatureBank) -> GradientTree:
    """Return the tree in the form in which every tree is stored and shown.

    A node's block is its level, its threshold the median; a group cut by position has neither
    threshold nor rule. Radius, median and spread describe the features in the unit of the bank.

    Args:
        root: the tree over all tasks of the bank.
        bank: the features the tree was built on, one block a row.
    """
    scales = bank.scales()

    def grouped(official: OfficialNode) -> Group:
        cut = bool(official.children)
        spans = member_distances(bank, official.tasks, scales).mean(1)
        return Group(
            tuple(sorted(official.tasks)),
            tuple(grouped(child) for child in official.children),
            split=("index" if official.by_position else "official") if cut else None,
            block=official.depth if cut else None,
            threshold=None if official.by_position else official.median,
            radius=float(spans.max()),
            median=float(spans.double().quantile(0.5)),
        )

    return GradientTree(grouped(root), "official", "index")
