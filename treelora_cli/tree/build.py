"""Build, extend and rebuild the gradient tree (paper section 3.3, design 5.1.2)."""

from __future__ import annotations

from torch import Tensor

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.tree import sampling
from treelora_cli.tree.groups import below, grow, measure
from treelora_cli.tree.growth import insert, is_unbalanced
from treelora_cli.tree.nodes import GradientTree, Group, Node
from treelora_cli.tree.signatures import SignatureBank
from treelora_cli.tree.splits import SPLITS

BLOCK_RULES = ("spread", "index")
REBUILDS = ("auto", "always", "unbalanced")


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

    A bank of more than ``sampling.EXACT_TASKS`` tasks is cut by an approximation (a sample of the
    entries chooses the block, the axis of a large group is iterated, radii come from a sample of
    the members); one of at most so many exactly. Neither depends on chance.

    Raises:
        UsageError: an unknown rule.
        ValueError: the bank is empty.
    """
    _check_rules(split, block_rule)
    if len(bank) == 0:
        raise ValueError("a tree needs at least one task")
    top = Group(tuple(range(len(bank))))
    grow(top, 0, bank, split, block_rule)
    scales = bank.scales()
    for group in below(top):
        measure(group, bank, scales)
    return GradientTree(top, split, block_rule)


def update_tree(
    tree: GradientTree | None,
    bank: SignatureBank,
    split: str = "principal",
    block_rule: str = "spread",
    rebuild: str = "auto",
) -> GradientTree:
    """Return the tree after the bank has grown by one task.

    Args:
        tree: the tree before, or None.
        bank: the grown bank.
        split: as in ``build_tree``.
        block_rule: as in ``build_tree``.
        rebuild: ``always`` builds anew, so that the tree depends on the signatures alone;
            ``unbalanced`` inserts the new leaf and builds anew only when out of balance; ``auto``
            is ``always`` while the bank holds at most ``sampling.EXACT_TASKS`` tasks and
            ``unbalanced`` from there on. In a bank that large only the group that is out of
            balance is built anew, so that the cost of an insertion stays that of a path.

    Raises:
        UsageError: an unknown rule.
    """
    _check_rules(split, block_rule)
    if rebuild not in REBUILDS:
        raise UsageError(f"unknown tree.rebuild {rebuild!r}", did_you_mean(rebuild, list(REBUILDS)))
    large = len(bank) > sampling.EXACT_TASKS
    if rebuild == "always" or (rebuild == "auto" and not large):
        return build_tree(bank, split, block_rule)
    same = tree is not None and (tree.split, tree.block_rule) == (split, block_rule)
    if tree is None or not same or len(tree) + 1 != len(bank):
        return build_tree(bank, split, block_rule)
    grown = insert(tree, bank, len(bank) - 1, rebalance=large)
    if not large and is_unbalanced(grown):
        return build_tree(bank, split, block_rule)
    return grown


def node_mean(bank: SignatureBank, node: Node) -> Tensor:
    """Return the mean signature of a node's members, float32 [F] on the host."""
    return bank.mean(node.tasks)


def _check_rules(split: str, block_rule: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"unknown tree.split {split!r}", did_you_mean(split, list(SPLITS)))
    if block_rule not in BLOCK_RULES:
        hint = did_you_mean(block_rule, list(BLOCK_RULES))
        raise UsageError(f"unknown tree.block {block_rule!r}", hint)
