"""The gradient tree as data: immutable nodes in pre-order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """One group of tasks.

    Attributes:
        id: the position in pre-order; the root is 0, a parent's id is below its children's.
        parent: id of the parent, None for the root.
        children: ids of the two children, left first; empty for a leaf.
        tasks: indices of the tasks in the group, ascending; a leaf has one, but in a tree of
            bounded depth it may have several.
        depth: distance from the root.
        split: the rule that cut the group (``principal``, ``paper``, ``official``, or ``index``
            where the rule could not tell the tasks apart); None for a leaf.
        block: the block the rule looked at; None for a leaf.
        threshold: the cut in the rule's own coordinate (see ``splits``); None for a leaf and for
            a cut by index.
        radius: the largest distance of a member to the group's mean signature, in the unit of xi.
        median: the median of those distances (the paper's delta), in the unit of xi.
        spread: how much the group spreads along one axis of ``block`` relative to chance, about
            1 where the block does not tell the tasks apart; 0 for a leaf.
    """

    id: int
    parent: int | None
    children: tuple[int, ...]
    tasks: tuple[int, ...]
    depth: int
    split: str | None
    block: int | None
    threshold: float | None
    radius: float
    median: float
    spread: float

    @property
    def is_leaf(self) -> bool:
        """Whether the node has no children."""
        return not self.children


@dataclass(frozen=True, slots=True)
class GradientTree:
    """A binary tree whose leaves hold the tasks.

    Attributes:
        nodes: all nodes in pre-order, 2N - 1 of them where every leaf has one task.
        split: the split rule it was built with.
        block_rule: how the block of a split was chosen, ``spread`` or ``index``.
    """

    nodes: tuple[Node, ...]
    split: str
    block_rule: str
    _leaves: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        leaves = {task: node.id for node in self.nodes if node.is_leaf for task in node.tasks}
        object.__setattr__(self, "_leaves", tuple(leaves[task] for task in range(len(leaves))))

    @property
    def root(self) -> Node:
        """The node that holds every task."""
        return self.nodes[0]

    @property
    def depth(self) -> int:
        """The depth of the deepest leaf; 0 for a single task."""
        return max(node.depth for node in self.nodes)

    @property
    def leaves(self) -> Sequence[int]:
        """Node id of each task's leaf, by task index."""
        return self._leaves

    def path_to(self, task: int) -> tuple[int, ...]:
        """Return the node ids from the root to the leaf of a task."""
        path = []
        at: int | None = self._leaves[task]
        while at is not None:
            path.append(at)
            at = self.nodes[at].parent
        return tuple(reversed(path))
