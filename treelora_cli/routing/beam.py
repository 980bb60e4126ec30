"""A tree over the tasks' whitened means, searched with a beam where tasks are very many.

The tree is a gradient tree in form (same cuts, same nodes), with a task's mean in place of its
signature, so that whatever shows the one can show the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.tree.build import build_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.signatures import SignatureBank

# Entries of the largest temporary of a search (64 MiB of float32).
_CHUNK_ENTRIES = 1 << 24

# Scores within this many units in the last place of the best are ties.
_ROUNDING = 64


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The nearest task of each of n queries.

    Attributes:
        indices: int64 [n], the nearest of the tasks compared with; the lower index on ties.
        scores: [n], z.m - |m|^2 / 2 of that task.
        margins: [n], by how much that exceeds the next best score; infinite with one task.
        dots: int64 [n], the dot products of width H that it took.
    """

    indices: Tensor
    scores: Tensor
    margins: Tensor
    dots: Tensor


def nearest(tasks: Tensor, scores: Tensor, dots: Tensor) -> Found:
    """Choose the task with the best score; what differs by rounding only counts as equal.

    Args:
        tasks: int64 [n, c], the tasks compared with.
        scores: float [n, c]; minus infinity where there is none.
        dots: int64 [n].
    """
    best = scores.topk(min(2, scores.shape[1]), dim=1).values
    rounding = _ROUNDING * torch.finfo(scores.dtype).eps * (1 + best[:, :1].abs())
    beyond = torch.iinfo(torch.int64).max
    indices = tasks.masked_fill(scores < best[:, :1] - rounding, beyond).min(1).values
    alone = torch.full_like(best[:, 0], torch.inf)
    margins = best[:, 0] - best[:, 1] if best.shape[1] == 2 else alone
    return Found(indices, best[:, 0], margins, dots)


class FeatureTree:
    """A balanced binary tree over means, each node known by the mean of its members.

    Groups are cut at the largest gap along their first principal axis, each side keeping at least
    a quarter of the group (``tree.splits.principal``): the depth is logarithmic.

    Args:
        names: K task names.
        means: [K, H], whitened; K at least 1.

    Attributes:
        bank: the means as signatures of one block of H entries.
        tree: the nodes; ``tree.serial.to_document(tree, bank)`` writes them.
    """

    def __init__(self, names: Sequence[str], means: Tensor) -> None:
        rows = means.detach().float().contiguous()
        count, width = rows.shape
        self.bank = SignatureBank(tuple(names), rows, (width,), torch.zeros(count, 1))
        self.tree: GradientTree = build_tree(self.bank)
        nodes = self.tree.nodes
        self._centres = torch.stack([self.bank.mean(node.tasks) for node in nodes])
        self._offsets = self._centres.square().sum(1) / 2
        leaf = [node.tasks[0] if node.is_leaf else -1 for node in nodes]
        self._task = torch.tensor(leaf)
        self._children = torch.tensor([node.children or (node.id, node.id) for node in nodes])

    def search(self, rows: Tensor, beam: int) -> Found:
        """Descend from the root, at every level keeping the nodes with the nearest means.

        Leaves reached stay in the beam. A beam of K or more compares with every task.

        Args:
            rows: [n, H], whitened.
            beam: nodes kept a level, at least 1.

        Raises:
            ValueError: a beam below 1.
        """
        if beam < 1:
            raise ValueError(f"a beam keeps at least one node, not {beam}")
        size = max(1, _CHUNK_ENTRIES // (2 * beam * self._centres.shape[1]))
        parts = [self._descend(part.float(), beam) for part in torch.split(rows, size)]
        return Found(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.margins for part in parts]),
            torch.cat([part.dots for part in parts]),
        )

    def _descend(self, rows: Tensor, beam: int) -> Found:
        nodes = torch.zeros(rows.shape[0], 1, dtype=torch.int64)
        scores = self._scores(rows, nodes)
        dots = torch.ones(rows.shape[0], dtype=torch.int64)
        while bool((self._task[nodes] < 0).any()):
            leaves = self._task[nodes] >= 0
            # A leaf is its own first child and has no second one.
            options = self._children[nodes].flatten(1)
            dots += 2 * (~leaves & ~scores.isneginf()).sum(1)
            values = self._scores(rows, options)
            values[
                torch.stack([scores.isneginf(), leaves | scores.isneginf()], 2).flatten(1)
            ] = -torch.inf
            scores, at = values.topk(min(beam, values.shape[1]), dim=1)
            nodes = options.gather(1, at)
        return nearest(self._task[nodes], scores, dots)

    def _scores(self, rows: Tensor, nodes: Tensor) -> Tensor:
        return torch.einsum("nch,nh->nc", self._centres[nodes], rows) - self._offsets[nodes]
