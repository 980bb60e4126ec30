"""Synthetic signatures with a known answer, and how well a search does on them.

Clusters: the entries of a cluster's centre are N(0, 3), those of a member's own part N(0, 1), so
that the expected mean absolute difference of two members of one cluster (2 / sqrt(pi) = 1.13) is
half that of members of two clusters (2.26). "Within" and "between" are those two figures. The
query is one more member of one cluster, not stored. A pull of arm k gives xi of the query and k
plus Gaussian noise whose deviation is `noise` times the mean gap between the arms of the other
clusters and those of the right one.

Smooth trees: the signature of a leaf of a full binary tree of depth log2 N is the sum of one
Gaussian offset for each of its ancestors, the offset at depth h scaled by gamma ** h. The query is
a leaf's signature plus one more offset of the deepest scale.

Run as a script to print the table that the defaults were chosen by:
    PYTHONPATH=. python tests/tree/tree_synthetic.py
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.tree.build import build_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.scopes import node_deltas
from treelora_cli.tree.search import FlatSearch, RandomSearch, Search, TreeSearch
from treelora_cli.tree.signatures import SignatureBank


@dataclass(frozen=True)
class Problem:
    """A bank, a query and the arms that count as right."""

    bank: SignatureBank
    query: Tensor
    right: frozenset[int]
    labels: tuple[int, ...]
    noise: float = 0.25

    def xis(self) -> list[float]:
        return self.bank.xi_all(self.query, self.bank.scales()).tolist()

    def deviation(self) -> float:
        xis = self.xis()
        near = [xi for arm, xi in enumerate(xis) if arm in self.right]
        far = [xi for arm, xi in enumerate(xis) if arm not in self.right]
        return self.noise * (statistics.mean(far) - statistics.mean(near))


def bank_of(values: Tensor, widths: tuple[int, ...]) -> SignatureBank:
    n = values.shape[0]
    names = tuple(f"T{i:04d}" for i in range(n))
    return SignatureBank(names, values.float(), widths, torch.ones(n, len(widths)))


def clusters(
    seed: int,
    n: int = 64,
    groups: int = 8,
    blocks: int = 8,
    width: int = 32,
    noise: float = 0.25,
    informative: int | None = None,
) -> Problem:
    """Gaussian clusters in a random order; `informative`: blocks that know of the clusters."""
    rng = torch.Generator().manual_seed(seed)
    centres = math.sqrt(3) * torch.randn(groups, blocks, width, generator=rng)
    if informative is not None:
        order = torch.randperm(blocks, generator=rng)
        centres[:, order[informative:]] = 0
    labels = (torch.arange(n) % groups)[torch.randperm(n, generator=rng)]
    values = centres[labels] + torch.randn(n, blocks, width, generator=rng)
    wanted = int(torch.randint(groups, (1,), generator=rng))
    query = (centres[wanted] + torch.randn(blocks, width, generator=rng)).flatten()
    right = frozenset(torch.nonzero(labels == wanted).flatten().tolist())
    bank = bank_of(values.flatten(1), (width,) * blocks)
    return Problem(bank, query, right, tuple(labels.tolist()), noise)


def smooth(
    seed: int, n: int = 64, gamma: float = 0.5, blocks: int = 8, width: int = 32, noise: float = 0.1
) -> Problem:
    """A smooth tree; right are the best 5 % of the leaves, noise is a share of the range of xi."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.zeros(1, blocks * width)
    depth = int(math.log2(n))
    for level in range(1, depth + 1):
        offsets = gamma**level * torch.randn(2**level, blocks * width, generator=rng)
        values = values.repeat_interleave(2, 0) + offsets
    values = values[torch.randperm(n, generator=rng)]
    wanted = int(torch.randint(n, (1,), generator=rng))
    query = values[wanted] + gamma**depth * torch.randn(blocks * width, generator=rng)
    bank = bank_of(values, (width,) * blocks)
    xis = bank.xi_all(query, bank.scales())
    right = frozenset(xis.argsort()[: max(1, round(0.05 * n))].tolist())
    near = float(xis[list(right)].mean())
    far = float(xis[[i for i in range(n) if i not in right]].mean())
    relative = noise * float(xis.max() - xis.min()) / (far - near)
    return Problem(bank, query, right, tuple(range(n)), relative)


def make(kind: str, problem: Problem, c: float, delta: str, split: str, rule: str) -> Search:
    arms = len(problem.bank)
    if kind == "flat":
        return FlatSearch(arms, c)
    if kind == "random":
        return RandomSearch(arms, 0)
    tree = build_tree(problem.bank, split, rule)
    return TreeSearch(tree, c, node_deltas(tree, problem.bank, delta)[0])


def play(search: Search, problem: Problem, steps: int, seed: int) -> list[int]:
    """Return the arms pulled in `steps` steps."""
    xis, deviation = problem.xis(), problem.deviation()
    noise = random.Random(seed)
    arms = []
    for _ in range(steps):
        arm = search.choose(lambda: torch.tensor(xis))
        search.update(arm, xis[arm] + noise.gauss(0, deviation))
        arms.append(arm)
    return arms


def hits(arms: list[int], right: frozenset[int]) -> float:
    """Share of the second half's pulls that are right."""
    half = arms[len(arms) // 2 :]
    return sum(arm in right for arm in half) / len(half)


def regret(arms: list[int], problem: Problem) -> float:
    """Mean over the pulls of xi above the best arm's, in units of the range of xi, times pulls."""
    xis = problem.xis()
    best, worst = min(xis), max(xis)
    return sum(xis[arm] - best for arm in arms) / (worst - best)


def purity(tree: GradientTree, labels: tuple[int, ...]) -> float:
    """Mean share of the most frequent label in the groups at depth log2 of the number of labels."""
    level = round(math.log2(len(set(labels))))
    groups = [
        node
        for node in tree.nodes
        if node.depth == level or (node.is_leaf and node.depth < level)
    ]
    most = [statistics.multimode([labels[task] for task in node.tasks])[0] for node in groups]
    right = sum(
        sum(labels[task] == label for task in node.tasks)
        for node, label in zip(groups, most, strict=True)
    )
    return right / len(labels)
