"""Equation 2 recomputed from a log of pulls, with nothing kept between pulls."""

from __future__ import annotations

import math


def brute_force_arm(tree, deltas: list[float], log: list[tuple[int, float]], c: float) -> int:
    """Eq. 2 from the pull log alone, everything recomputed."""
    refreshed = 2 ** int(math.log2(len(log))) if log else 0
    known = [xi for _, xi in log[:refreshed]]
    mean = sum(known) / len(known) if known else 0.0
    sigma = math.sqrt(sum((xi - mean) ** 2 for xi in known) / len(known)) if known else 0.0

    def pulls(node) -> list[float]:
        return [xi for arm, xi in log if arm in node.tasks]

    def bound(node) -> float:
        own = pulls(node)
        if not own:
            return -math.inf
        parent = tree.nodes[node.parent] if node.parent is not None else node
        width = c * sigma * math.sqrt(math.log(1 + len(pulls(parent))) / len(own))
        value = sum(own) / len(own) - width
        if node.is_leaf:
            return value
        return max(
            min(bound(tree.nodes[child]) for child in node.children), value - deltas[node.id]
        )

    node = tree.root
    while not node.is_leaf:
        node = min((tree.nodes[child] for child in node.children), key=lambda n: (bound(n), n.id))
    return node.tasks[0]
