"""Build, extend and rebuild the gradient tree (paper section 3.3, design 5.1.2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.tree.nodes import GradientTree, Node
from treelora_cli.tree.signatures import SignatureBank, block_means
from treelora_cli.tree.splits import SPLITS, axis_share

BLOCK_RULES = ("spread", "index")
REBUILDS = ("always", "unbalanced")

# A fresh tree keeps at least a quarter of a group on each side; one insertion may go a bit past.
_LARGEST_SHARE = 0.8


@dataclass(slots=True)
class _Draft:
    """A node before it has a number."""

    tasks: list[int]
    children: list[_Draft] = field(default_factory=list)
    split: str | None = None
    block: int | None = None
    threshold: float | None = None
    spread: float = 0.0


def build_tree(
    bank: SignatureBank, split: str = "principal", block_rule: str = "spread"
) -> GradientTree:
    """Build the tree over all tasks of a bank from nothing.

    Args:
        bank: at least one task.
        split: how a group is cut: ``principal``, ``paper`` or ``official`` (see ``splits``).
        block_rule: which block a group is cut by: ``spread``, the one where the group spreads
            most along one axis, relative to chance (``splits.axis_share``; the lower block on
            ties), or ``index``, the block whose number is the group's depth (the last one from
            there on). A spread relative to the block's size alone would not do: a block of noise
            has the largest, and groups cut there are no purer than chance.

    Raises:
        UsageError: an unknown rule.
        ValueError: the bank is empty.
    """
    _check_rules(split, block_rule)
    if len(bank) == 0:
        raise ValueError("a tree needs at least one task")
    root = _Draft(list(range(len(bank))))
    _grow(root, 0, bank, split, block_rule)
    return _number(root, bank, split, block_rule)


def insert(tree: GradientTree, bank: SignatureBank, index: int) -> GradientTree:
    """Add one task as a leaf: descend to the nearer branch, then cut the leaf reached in two.

    At every node the child whose mean signature is nearer (in the unit of xi) is taken. Radii and
    medians of all nodes are renewed, since the scales c_d belong to the grown bank; the cuts
    above the leaf stay.

    Args:
        tree: a tree over tasks 0 .. index - 1.
        bank: holds the new task at ``index``, its last.
        index: the new task.

    Raises:
        ValueError: ``index`` is not the next task, or the bank does not fit.
    """
    if index != len(tree.leaves) or len(bank) != index + 1:
        raise ValueError(f"task {index} is not the next one of {len(tree.leaves)} in the tree")
    root = _drafts(tree)
    scales = bank.scales()
    at, depth = root, 0
    while at.children:
        at.tasks.append(index)
        means = [bank.mean(child.tasks) for child in at.children]
        gaps = [_distance(bank.values[index], mean, bank.widths, scales) for mean in means]
        at = at.children[0 if gaps[0] <= gaps[1] else 1]
        depth += 1
    at.tasks.append(index)
    _grow(at, depth, bank, tree.split, tree.block_rule)
    return _number(root, bank, tree.split, tree.block_rule)


def is_unbalanced(tree: GradientTree) -> bool:
    """Whether some group has more than four fifths of its tasks on one side."""
    for node in tree.nodes:
        if any(
            len(tree.nodes[child].tasks) > _LARGEST_SHARE * len(node.tasks)
            for child in node.children
        ):
            return True
    return False


def update_tree(
    tree: GradientTree | None,
    bank: SignatureBank,
    split: str = "principal",
    block_rule: str = "spread",
    rebuild: str = "always",
) -> GradientTree:
    """Return the tree after the bank has grown by one task.

    Args:
        tree: the tree before, or None.
        bank: the grown bank.
        split: as in ``build_tree``.
        block_rule: as in ``build_tree``.
        rebuild: ``always`` builds anew, so that the tree depends on the signatures alone;
            ``unbalanced`` inserts the new leaf and builds anew only when out of balance.

    Raises:
        UsageError: an unknown rule.
    """
    _check_rules(split, block_rule)
    if rebuild not in REBUILDS:
        raise UsageError(f"unknown tree.rebuild {rebuild!r}", did_you_mean(rebuild, list(REBUILDS)))
    same = tree is not None and (tree.split, tree.block_rule) == (split, block_rule)
    if rebuild == "always" or tree is None or not same or len(tree.leaves) + 1 != len(bank):
        return build_tree(bank, split, block_rule)
    grown = insert(tree, bank, len(bank) - 1)
    return build_tree(bank, split, block_rule) if is_unbalanced(grown) else grown


def node_mean(bank: SignatureBank, node: Node) -> Tensor:
    """Return the mean signature of a node's members, float32 [F] on the host."""
    return bank.mean(node.tasks)


def member_distances(bank: SignatureBank, tasks: Sequence[int], scales: Tensor) -> Tensor:
    """Return float32 [n, D]: scaled distance of each member to the group's mean, per block.

    Args:
        bank: the signatures.
        tasks: the group's members.
        scales: c_d, [D].
    """
    return bank.block_distances(bank.mean(tasks), tasks) / scales


def _check_rules(split: str, block_rule: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"unknown tree.split {split!r}", did_you_mean(split, list(SPLITS)))
    if block_rule not in BLOCK_RULES:
        hint = did_you_mean(block_rule, list(BLOCK_RULES))
        raise UsageError(f"unknown tree.block {block_rule!r}", hint)


def _grow(root: _Draft, depth: int, bank: SignatureBank, split: str, block_rule: str) -> None:
    """Cut a group, then its sides, down to single tasks; a stack, since chains may be long."""
    offsets = [0, *torch.tensor(bank.widths).cumsum(0).tolist()]
    pending = [(root, depth)]
    while pending:
        draft, level = pending.pop()
        if len(draft.tasks) == 1:
            continue
        if block_rule == "spread":
            spreads = _spreads(bank, draft.tasks, offsets)
            block = max(range(bank.blocks), key=lambda d: (round(spreads[d], 6), -d))
        else:
            block = min(level, bank.blocks - 1)
        rows = bank.values[:, offsets[block] : offsets[block + 1]][draft.tasks]
        cut = SPLITS[split](rows)
        draft.split = split if cut.threshold is not None else "index"
        draft.block, draft.threshold, draft.spread = block, cut.threshold, axis_share(rows)
        draft.children = [_Draft([draft.tasks[i] for i in side]) for side in (cut.left, cut.right)]
        pending.extend((child, level + 1) for child in draft.children)


def _spreads(bank: SignatureBank, tasks: list[int], offsets: list[int]) -> list[float]:
    """Return for each block how much the tasks spread along one axis, relative to chance."""
    return [axis_share(bank.values[:, start:end][tasks]) for start, end in pairwise(offsets)]


def _number(root: _Draft, bank: SignatureBank, split: str, block_rule: str) -> GradientTree:
    """Give the drafts their pre-order ids, radii and medians."""
    scales = bank.scales()
    nodes: list[Node] = []
    children: dict[int, list[int]] = {}
    pending: list[tuple[_Draft, int | None, int]] = [(root, None, 0)]
    while pending:
        draft, parent, depth = pending.pop()
        tasks = sorted(draft.tasks)
        spans = member_distances(bank, tasks, scales).mean(1).tolist() if tasks[1:] else [0.0]
        at = len(nodes)
        node = Node(
            at, parent, (), tuple(tasks), depth, draft.split, draft.block, draft.threshold,
            max(spans), statistics.median(spans), draft.spread,
        )  # fmt: skip
        nodes.append(node)
        if parent is not None:
            children.setdefault(parent, []).append(at)
        pending.extend((child, at, depth + 1) for child in reversed(draft.children))
    return GradientTree(
        tuple(replace(node, children=tuple(children.get(node.id, ()))) for node in nodes),
        split,
        block_rule,
    )


def _drafts(tree: GradientTree) -> _Draft:
    drafts = [
        _Draft(list(node.tasks), [], node.split, node.block, node.threshold, node.spread)
        for node in tree.nodes
    ]
    for node in tree.nodes:
        drafts[node.id].children = [drafts[child] for child in node.children]
    return drafts[0]


def _distance(left: Tensor, right: Tensor, widths: tuple[int, ...], scales: Tensor) -> float:
    return float((block_means((left - right).abs(), widths) / scales).mean())
