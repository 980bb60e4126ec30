"""How far the mean of a node may lie above its best member: the delta of the tree's bound."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from treelora_cli.tree import sampling
from treelora_cli.tree.groups import member_distances, seen_members
from treelora_cli.tree.nodes import GradientTree, Node
from treelora_cli.tree.signatures import SignatureBank

DELTAS = ("observed", "median", "bound")

# Stored tasks that play the query when delta is observed.
_OBSERVERS = 16


def node_deltas(
    tree: GradientTree, bank: SignatureBank, delta: str, scope: str = "model"
) -> list[list[float]]:
    """Return how far the mean of a node may lie above its best member, for every search.

    ``bound`` is never too small (triangle inequality) but so wide in many dimensions that most
    tasks get pulled once; ``median`` has no such promise. ``observed`` measures the very thing:
    up to 16 stored tasks, evenly spaced, play the query, and delta is the largest difference
    between the mean and the least xi of the node's other members that any of them sees.

    In a bank of more than ``sampling.EXACT_TASKS`` tasks the tasks are compared by
    ``sampling.ENTRIES`` evenly spaced entries of each block instead of all (``observed``, and the
    others where the scope is ``block``), and a node's radius and median are those of a sample of
    its members (see ``groups.measure``), so that ``bound`` may then be too small for a member that
    lies further out.

    Args:
        tree: the tree over the bank's tasks.
        bank: the stored signatures.
        delta: ``observed``, ``median`` or ``bound``.
        scope: ``model`` or ``block``.

    Returns:
        one list (``model``) or D lists (``block``) of a delta for every node id, in the unit of
        the search's xi.
    """
    nodes, scales = tree.nodes, bank.scales()
    large = len(bank) > sampling.EXACT_TASKS
    if delta == "observed":
        seen, own = _observations(bank.thinned(sampling.ENTRIES) if large else bank, scales, scope)
        if large:
            return _observed_everywhere(seen, own, nodes).T.tolist()
        columns = [_observed(seen, own, node.tasks) for node in nodes]
    elif scope == "model":
        columns = [[2 * node.radius if delta == "bound" else node.median] for node in nodes]
    else:
        compared = bank.thinned(sampling.ENTRIES) if large else bank
        columns = [_block_spans(compared, node, scales, delta) for node in nodes]
    return [list(column) for column in zip(*columns, strict=True)]


def _block_spans(bank: SignatureBank, node: Node, scales: Tensor, delta: str) -> list[float]:
    """Return ``median`` or ``bound`` of a node at every block."""
    members = seen_members(node.tasks, bank)
    if len(members) == 1:
        return [0.0] * bank.blocks
    spans = member_distances(bank, members, scales).T.tolist()
    return [2 * max(span) if delta == "bound" else statistics.median(span) for span in spans]


def _observations(bank: SignatureBank, scales: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    """Return xi of Q stored tasks to all, [Q, N, columns], and whose it is their own, [Q, N]."""
    queries = range(0, len(bank), -(-len(bank) // _OBSERVERS))
    seen = torch.stack([bank.scaled_distances(bank.values[q], scales) for q in queries])
    own = torch.tensor(queries).unsqueeze(1) == torch.arange(len(bank))
    return (seen.mean(2, keepdim=True) if scope == "model" else seen), own


def _observed(seen: Tensor, own: Tensor, tasks: tuple[int, ...]) -> list[float]:
    """Return the largest mean - min over a node's members other than the query, per column.

    Args:
        seen: [Q, N, columns], xi of each query to every task.
        own: [Q, N], whether the task is the query.
        tasks: the node's members.
    """
    mine = own[:, list(tasks)]
    others = len(tasks) - mine.sum(1)
    if not bool(others.any()):
        return [0.0] * seen.shape[2]
    found = seen[:, list(tasks)]
    mean = found.masked_fill(mine.unsqueeze(2), 0.0).sum(1) / others.clamp(min=1).unsqueeze(1)
    least = found.masked_fill(mine.unsqueeze(2), float("inf")).amin(1)
    gaps: list[float] = (mean - least)[others > 0].amax(0).clamp(min=0).tolist()
    return gaps


def _observed_everywhere(seen: Tensor, own: Tensor, nodes: tuple[Node, ...]) -> Tensor:
    """Return ``_observed`` of all nodes, [nodes, columns], to float64 rounding: level by level."""
    home = torch.zeros(seen.shape[1], dtype=torch.int64)
    levels: dict[int, list[tuple[int, ...]]] = {}
    for node in nodes:
        if node.is_leaf:
            home[list(node.tasks)] = node.id
        else:
            levels.setdefault(node.depth, []).append((node.id, *node.children))
    masked = own.T.unsqueeze(2)
    rows = seen.transpose(0, 1).double()
    queries, columns = rows.shape[1:]
    total = torch.zeros(len(nodes), queries, columns, dtype=torch.float64)
    # A query's xi to itself is zero and adds nothing.
    total.index_add_(0, home, rows)
    least = torch.full_like(total, float("inf"))
    homes = home.view(-1, 1, 1).expand_as(rows)
    least.scatter_reduce_(0, homes, rows.masked_fill(masked, float("inf")), "amin")
    others = torch.zeros(len(nodes), queries, 1, dtype=torch.float64)
    others.index_add_(0, home, (~masked).double())
    for depth in sorted(levels, reverse=True):
        at, left, right = torch.tensor(levels[depth]).unbind(1)
        total[at] = total[left] + total[right]
        others[at] = others[left] + others[right]
        least[at] = torch.minimum(least[left], least[right])
    gaps = torch.where(others > 0, total / others.clamp(min=1) - least, 0.0)
    return gaps.amax(1).clamp(min=0)
