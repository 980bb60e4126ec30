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
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.tree import synthetic as smooth_synthetic
from treelora_cli.tree.build import build_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.scopes import DEFAULT_C, DEFAULT_DELTA, node_deltas
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
    xis = problem.xis()
    return smooth_synthetic.play(
        search, xis, problem.deviation() / (max(xis) - min(xis)), steps, seed
    )


def hits(arms: list[int], right: frozenset[int]) -> float:
    """Share of the second half's pulls that are right."""
    half = arms[len(arms) // 2 :]
    return sum(arm in right for arm in half) / len(half)


def regret(arms: list[int], problem: Problem) -> float:
    """Total over the pulls of xi above the best arm's, in units of the range of xi."""
    return smooth_synthetic.regret(arms, problem.xis())


def purity(tree: GradientTree, labels: tuple[int, ...]) -> float:
    """Mean share of the most frequent label in the groups at depth log2 of the number of labels."""
    level = round(math.log2(len(set(labels))))
    groups = [
        node for node in tree.nodes if node.depth == level or (node.is_leaf and node.depth < level)
    ]
    most = [statistics.multimode([labels[task] for task in node.tasks])[0] for node in groups]
    right = sum(
        sum(labels[task] == label for task in node.tasks)
        for node, label in zip(groups, most, strict=True)
    )
    return right / len(labels)


def released_rule_hits(seed: int, steps: int) -> float:
    """The arm rule of the released code (one epoch, its per-layer statistics), as documented.

    sums hold negative distances; the bonus is subtracted and the whole negated again, so far and
    unpulled arms score high; scores are shifted by their minimum, divided by one range over all
    arms and layers, and every layer draws from a softmax of them.
    """
    problem = clusters(seed)
    table = problem.bank.scaled_distances(problem.query, problem.bank.scales()).double()
    noise = problem.deviation() * math.sqrt(table.shape[1])
    rng = torch.Generator().manual_seed(seed)
    sums, pulls = torch.zeros_like(table), torch.zeros_like(table)
    hits, layers = [], range(table.shape[1])
    for t in range(steps):
        mean = torch.where(pulls > 0, sums / pulls.clamp(min=1), 0.0)
        bonus = math.sqrt(math.log(2 * steps * (t + 1) * (t + 2))) / (2 * pulls + 1e-5).sqrt()
        score = -(mean - bonus)
        score = score + score.min()
        score = score / (score.max() - score.min() + 1e-5)
        arms = torch.multinomial(score.T.softmax(1), 1, generator=rng).flatten().tolist()
        for layer, arm in zip(layers, arms, strict=True):
            pulls[arm, layer] += 1
            pull_noise = noise * float(torch.randn((), generator=rng, dtype=torch.float64))
            sums[arm, layer] -= float(table[arm, layer]) + pull_noise
        if t >= steps // 2:
            hits.append(sum(arm in problem.right for arm in arms) / len(arms))
    return statistics.mean(hits)


def score(
    kind: str,
    make_problem: Callable[[int], Problem],
    steps: int,
    c: float,
    delta: str,
    **rules: str,
) -> tuple[float, float, float]:
    """Return median hits, the 10th percentile of hits and the median regret of 20 seeds."""
    found, regrets = [], []
    for seed in range(20):
        problem = make_problem(seed)
        split, rule = rules.get("split", "principal"), rules.get("rule", "spread")
        arms = play(make(kind, problem, c, delta, split, rule), problem, steps, seed)
        found.append(hits(arms, problem.right))
        regrets.append(regret(arms, problem))
    return statistics.median(found), sorted(found)[2], statistics.median(regrets)


PROBLEMS: dict[str, tuple[int, Callable[[int], Problem]]] = {
    "8 clusters": (200, clusters),
    "8 clusters, T = 64": (64, clusters),
    "8 clusters, noise 1": (200, lambda seed: clusters(seed, noise=1.0)),
    "8 clusters in 2 blocks of 8": (200, lambda seed: clusters(seed, informative=2)),
    "N = 7, 3 clusters, T = 32": (32, lambda seed: clusters(seed, n=7, groups=3)),
    "smooth tree, N = 64": (500, smooth),
    "smooth tree, N = 256": (500, lambda seed: smooth(seed, n=256)),
}


def table() -> Iterator[str]:
    """Give, line by line, what the defaults were chosen by: hits (10th percentile) / regret."""
    for name, (steps, problem) in PROBLEMS.items():
        chance = "{:.2f} ({:.2f}) / {:.0f}".format(*score("random", problem, steps, 0, ""))
        yield f"\n{name}: hits (10th percentile) / regret, random {chance}"
        for c in (0.25, 0.5, 0.75, 1.0, 2.0):
            cells = [f"c {c:4}"]
            for delta in ("observed", "median", "bound"):
                result = score("tree", problem, steps, c, delta)
                cells.append(delta + " {:.2f} ({:.2f}) / {:3.0f}".format(*result))
            cells.append(
                "flat {:.2f} ({:.2f}) / {:3.0f}".format(*score("flat", problem, steps, c, ""))
            )
            yield "   ".join(cells)
    released = [released_rule_hits(seed, 200) for seed in range(20)]
    yield f"\nreleased arm rule, 8 clusters: {statistics.median(released):.3f} of pulls"
    yield "\npurity at depth log2 G of G = 2 / 4 / 8 clusters, all and 2 of 8 blocks informative"
    for split in ("principal", "official", "paper"):
        for rule in ("spread", "index"):
            row = [f"{split:9} {rule:6}"]
            for informative in (None, 2):
                for groups in (2, 4, 8):
                    made = [clusters(s, groups=groups, informative=informative) for s in range(20)]
                    found = [purity(build_tree(p.bank, split, rule), p.labels) for p in made]
                    row.append(f"{statistics.mean(found):.2f}")
            for name in ("8 clusters", "8 clusters in 2 blocks of 8", "smooth tree, N = 64"):
                steps, problem = PROBLEMS[name]
                _, _, lost = score(
                    "tree", problem, steps, DEFAULT_C, DEFAULT_DELTA, split=split, rule=rule
                )
                row.append(f"regret {name}: {lost:.0f}")
            yield "  ".join(row)


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
