"""Add a task to a tree by touching one path of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from treelora_cli.tree import sampling
from treelora_cli.tree.groups import below, group_mean, grow, measure, seen_members
from treelora_cli.tree.nodes import GradientTree, Group
from treelora_cli.tree.signatures import SignatureBank, block_means

# A fresh tree keeps at least a quarter of a group on each side; one insertion may go a bit past.
_LARGEST_SHARE = 0.8


def insert(
    tree: GradientTree, bank: SignatureBank, index: int, rebalance: bool = False
) -> GradientTree:
    """Add one task as a leaf: descend to the nearer branch, then cut the leaf reached in two.

    At every node the child whose mean signature is nearer (in the unit of xi) is taken; the cuts
    above the leaf stay. While the bank holds at most ``sampling.EXACT_TASKS`` tasks, radii and
    medians of all nodes are renewed, since the scales c_d belong to the grown bank. Above that
    only those of the path, and of a group with more than ``sampling.EXACT_MEMBERS`` members only
    when its sample changes (see ``groups.measure``); everything off the path is shared with the
    old tree, which stays as it was.

    Args:
        tree: a tree over tasks 0 .. index - 1.
        bank: holds the new task at ``index``, its last.
        index: the new task.
        rebalance: cut the topmost group of the path that would get out of balance anew.

    Raises:
        ValueError: ``index`` is not the next task, or the bank does not fit.
    """
    if index != len(tree) or len(bank) != index + 1:
        raise ValueError(f"task {index} is not the next one of {len(tree)} in the tree")
    exact = len(bank) <= sampling.EXACT_TASKS
    top = GradientTree.of_nodes(tree.nodes, tree.split, tree.block_rule).top if exact else tree.top
    scales = bank.scales()
    path = _descent(top, bank, index, scales)
    if rebalance:
        path = _balanced_part(path)
    grown = Group((*path[-1].tasks, index))
    grow(grown, len(path) - 1, bank, tree.split, tree.block_rule)
    stale = list(below(grown))
    for old, below_it in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
        grown = _with_task(old, below_it, grown, bank, index)
        if seen_members(grown.tasks, bank) != seen_members(old.tasks, bank):
            stale.append(grown)
    for group in below(grown) if exact else stale:
        measure(group, bank, scales)
    return GradientTree(grown, tree.split, tree.block_rule)


def is_unbalanced(tree: GradientTree) -> bool:
    """Whether some group has more than four fifths of its tasks on one side."""
    return any(
        _too_much(len(child.tasks), len(group.tasks))
        for group in below(tree.top)
        for child in group.children
    )


def _descent(top: Group, bank: SignatureBank, index: int, scales: Tensor) -> list[Group]:
    """Return the groups from the top to the leaf that is nearest by the means on the way."""
    path = [top]
    while path[-1].children:
        left, right = path[-1].children
        gaps = [_distance(bank, index, group_mean(side, bank), scales) for side in (left, right)]
        path.append(left if gaps[0] <= gaps[1] else right)
    return path


def _distance(bank: SignatureBank, index: int, mean: Tensor, scales: Tensor) -> float:
    gaps = (bank.values[index] - mean).abs()
    return float((block_means(gaps, bank.widths) / scales).mean())


def _balanced_part(path: Sequence[Group]) -> list[Group]:
    """Cut a path off at the topmost group that one more task at its end would unbalance."""
    for depth, (group, child) in enumerate(pairwise(path)):
        other = len(group.tasks) - len(child.tasks)
        if _too_much(max(len(child.tasks) + 1, other), len(group.tasks) + 1):
            return list(path[: depth + 1])
    return list(path)


def _too_much(side: int, whole: int) -> bool:
    return side > _LARGEST_SHARE * whole


def _with_task(old: Group, side: Group, grown: Group, bank: SignatureBank, index: int) -> Group:
    """Return a group with one more task, ``grown`` in the place of its side ``side``."""
    children = tuple(grown if child is side else child for child in old.children)
    total = None if old.total is None else old.total + bank.values[index]
    return replace(old, tasks=(*old.tasks, index), children=children, total=total)
