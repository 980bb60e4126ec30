"""The gradient tree as data: groups that trees share, and numbered nodes in pre-order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
        radius: the largest distance of a member to the group's mean signature, in the unit of xi
            (of a sample of its members in a bank of more than ``sampling.EXACT_TASKS`` tasks).
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


@dataclass(slots=True, eq=False)
class Group:
    """One group of tasks as it is built and shared: a node that does not know its place.

    Filled while a tree is built or grown and never changed afterwards, so that a tree and the one
    that grew from it can share all groups off the new task's path. Attributes are those of
    ``Node`` but for:

    Attributes:
        children: the two sides, left first; empty for a leaf.
        total: the sum of the members' signatures, float64 [F], once somebody has asked for it.
    """

    tasks: tuple[int, ...]
    children: tuple[Group, ...] = ()
    split: str | None = None
    block: int | None = None
    threshold: float | None = None
    radius: float = 0.0
    median: float = 0.0
    spread: float = 0.0
    total: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class GradientTree:
    """A binary tree whose leaves hold the tasks.

    Its nodes are numbered when they are first asked for, so that growing a tree touches one path.

    Attributes:
        top: the group of all tasks.
        split: the split rule it was built with.
        block_rule: how the block of a split was chosen, ``spread`` or ``index``.
    """

    top: Group = field(repr=False)
    split: str
    block_rule: str

    @classmethod
    def of_nodes(cls, nodes: Sequence[Node], split: str, block_rule: str) -> GradientTree:
        """Return the tree of nodes in pre-order, with groups of its own."""
        groups = [
            Group(
                node.tasks, (), node.split, node.block, node.threshold,
                node.radius, node.median, node.spread,
            )
            for node in nodes
        ]  # fmt: skip
        for node, group in zip(nodes, groups, strict=True):
            group.children = tuple(groups[child] for child in node.children)
        return cls(groups[0], split, block_rule)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradientTree):
            return NotImplemented
        mine, others = (self.split, self.block_rule), (other.split, other.block_rule)
        return mine == others and self.nodes == other.nodes

    def __hash__(self) -> int:
        return hash((self.split, self.block_rule, self.top.tasks))

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.top.tasks)

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in pre-order, 2N - 1 of them where every leaf has one task."""
        found: list[tuple[Group, int | None, int]] = []
        children: list[list[int]] = []
        pending: list[tuple[Group, int | None, int]] = [(self.top, None, 0)]
        while pending:
            group, parent, depth = pending.pop()
            at = len(found)
            found.append((group, parent, depth))
            children.append([])
            if parent is not None:
                children[parent].append(at)
            pending.extend((child, at, depth + 1) for child in reversed(group.children))
        return tuple(
            Node(
                at, parent, tuple(children[at]), group.tasks, depth, group.split, group.block,
                group.threshold, group.radius, group.median, group.spread,
            )
            for at, (group, parent, depth) in enumerate(found)
        )  # fmt: skip

    @property
    def root(self) -> Node:
        """The node that holds every task."""
        return self.nodes[0]

    @functools.cached_property
    def depth(self) -> int:
        """The depth of the deepest leaf; 0 for a single task."""
        return max(node.depth for node in self.nodes)

    @functools.cached_property
    def leaves(self) -> Sequence[int]:
        """Node id of each task's leaf, by task index."""
        leaves = {task: node.id for node in self.nodes if node.is_leaf for task in node.tasks}
        return tuple(leaves[task] for task in range(len(leaves)))

    def path_to(self, task: int) -> tuple[int, ...]:
        """Return the node ids from the root to the leaf of a task."""
        path = []
        nodes = self.nodes
        at: int | None = self.leaves[task]
        while at is not None:
            path.append(at)
            at = nodes[at].parent
        return tuple(reversed(path))
