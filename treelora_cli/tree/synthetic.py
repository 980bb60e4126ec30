"""Smooth synthetic trees: what a search over a tree can gain, where the answer is known.

Synthetic, not a model's signatures: the worth of an arm is a plain number, and arms that share
more of their path from the root are worth more nearly the same (the smoothness that tree bandits
assume: Coquelin & Munos, Bandit Algorithms for Tree Search, 2007).
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from treelora_cli.tree.nodes import GradientTree, Group
from treelora_cli.tree.search import Search

# Pulls whose share of good arms is looked at.
_WINDOW = 50


@dataclass(frozen=True)
class SmoothTree:
    """A tree over arms of known worth.

    Attributes:
        values: the expected feedback of every arm; smaller is better.
        tree: the binary tree over the arms, as even as their number allows.
        deltas: for every node id the spread of its leaves, their largest value less their least:
            the mean of pulls in a node cannot lie further above its best member.
    """

    values: tuple[float, ...]
    tree: GradientTree
    deltas: tuple[float, ...]

    def noise(self, share: float = 0.1) -> float:
        """Return the deviation that is a share of the values' range."""
        return share * (max(self.values) - min(self.values))

    def best(self, share: float = 0.05) -> frozenset[int]:
        """Return the best arms, a share of all, at least one."""
        order = sorted(range(len(self.values)), key=self.values.__getitem__)
        return frozenset(order[: max(1, round(share * len(order)))])


def smooth_tree(seed: int, n: int, gamma: float) -> SmoothTree:
    """Return a tree of n arms whose values are sums of offsets along the path from the root.

    Every node h below the root has an offset of its own, Gaussian with deviation gamma ** h, and
    a leaf's value is the sum over its path. Offsets are drawn level by level: of the same seed a
    tree of 1,024 arms goes on where one of 64 ends, so the two can be compared.

    Args:
        seed: of the offsets.
        n: number of arms, at least 1.
        gamma: how much smaller the offsets are a level further down; smaller is smoother.
    """
    rng = random.Random(f"smooth tree {seed}")
    values = [0.0] * n
    top = Group(tuple(range(n)))
    pending = deque([(top, 0)])
    while pending:
        group, depth = pending.popleft()
        offset = gamma**depth * rng.gauss(0, 1) if depth else 0.0
        for task in group.tasks:
            values[task] += offset
        if len(group.tasks) > 1:
            half = (len(group.tasks) + 1) // 2
            sides = group.tasks[:half], group.tasks[half:]
            group.children = tuple(Group(side) for side in sides)
            group.split, group.block = "index", 0
            pending.extend((child, depth + 1) for child in group.children)
    tree = GradientTree(top, "principal", "index")
    held = [[values[task] for task in node.tasks] for node in tree.nodes]
    return SmoothTree(tuple(values), tree, tuple(max(some) - min(some) for some in held))


def play(search: Search, values: Sequence[float], noise: float, steps: int, seed: int) -> list[int]:
    """Let a search pull arms and return them in order.

    Args:
        search: over ``len(values)`` arms, with no pulls yet.
        values: the expected feedback of every arm.
        noise: deviation of the Gaussian noise on each feedback, as a share of the values' range.
        steps: how many pulls.
        seed: of the noise.
    """
    rng = random.Random(seed)
    deviation = noise * (max(values) - min(values))
    arms = []
    for _ in range(steps):
        arm = search.choose(lambda: torch.tensor(values))
        search.update(arm, values[arm] + rng.gauss(0, deviation))
        arms.append(arm)
    return arms


def regret(arms: Sequence[int], values: Sequence[float]) -> float:
    """Return how much worse than the best arm the pulls were in all, in units of the range."""
    best, worst = min(values), max(values)
    return sum(values[arm] - best for arm in arms) / (worst - best) if worst > best else 0.0


def steps_until(
    arms: Sequence[int], good: Collection[int], share: float = 0.9, window: int = _WINDOW
) -> int | None:
    """Return after how many pulls a share of the next ones is good; None if that never comes.

    Args:
        arms: the pulls in order.
        good: the arms that count.
        share: of a window of pulls.
        window: how many pulls are looked at together.
    """
    hits = [arm in good for arm in arms]
    for step in range(len(hits) - window + 1):
        if statistics.fmean(hits[step : step + window]) >= share:
            return step
    return None
