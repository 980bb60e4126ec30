"""The search of a task as the engine uses it: one search for the model, or one for every block.

Both scopes have the same face: ``choose`` gives a tuple of arms, ``SignatureBank.pull`` turns it
into as many xi, ``update`` takes them back, and ``PathTargets`` takes ``paths()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from treelora_cli.errors import RunDirError, UsageError, did_you_mean
from treelora_cli.tree.deltas import DELTAS, node_deltas
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.search import (
    ExhaustiveSearch,
    FlatSearch,
    RandomSearch,
    Search,
    TreeSearch,
)
from treelora_cli.tree.signatures import SignatureBank

SEARCHES = ("tree", "flat", "random", "exhaustive")
SCOPES = ("model", "block")

# Chosen by measurement: tests/tree/tree_synthetic.py prints the table.
DEFAULT_C = 1.0
DEFAULT_DELTA = "observed"


class ScopedSearch:
    """One search (scope ``model``) or D independent searches (scope ``block``).

    Args:
        searches: the searches, in depth order.
    """

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = tuple(searches)

    def choose(self, distances: Callable[[], Tensor]) -> tuple[int, ...]:
        """Return one arm for every search.

        Args:
            distances: gives the scaled distance of every arm at every block, [N, D] (see
                ``SignatureBank.scaled_distances``); only the exhaustive search calls it.
        """
        found: list[Tensor] = []

        def of(block: int) -> Tensor:
            if not found:
                found.append(distances())
            return found[0].mean(1) if len(self._searches) == 1 else found[0][:, block]

        return tuple(
            search.choose(partial(of, block)) for block, search in enumerate(self._searches)
        )

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Return the node ids from the root to the last chosen leaf, for every search."""
        return tuple(search.path() for search in self._searches)

    def update(self, arms: Sequence[int], xis: Sequence[float]) -> None:
        """Record one pull of every search.

        Args:
            arms: what ``choose`` returned, now or some steps ago.
            xis: as many feedbacks, from ``SignatureBank.pull(...).tolist()``.

        Raises:
            DivergedError: a feedback is not a finite number.
        """
        for search, arm, xi in zip(self._searches, arms, xis, strict=True):
            search.update(arm, xi)

    def statistics(self) -> list[dict[str, Any]]:
        """Return the statistics of every search, for the task's record."""
        return [search.statistics() for search in self._searches]

    def state(self) -> dict[str, Any]:
        """Return everything that later choices depend on, as JSON values."""
        return {"searches": [search.state() for search in self._searches]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned.

        Raises:
            RunDirError: it belongs to another search, scope or tree.
        """
        saved = state.get("searches", [])
        if len(saved) != len(self._searches):
            raise RunDirError(
                f"the bandit's state holds {len(saved)} searches, not {len(self._searches)}",
                "the checkpoint belongs to another recipe; start the task anew",
            )
        for search, one in zip(self._searches, saved, strict=True):
            search.load_state(one)


def make_search(
    kind: str,
    tree: GradientTree,
    bank: SignatureBank,
    *,
    scope: str = "model",
    c: float = DEFAULT_C,
    delta: str = DEFAULT_DELTA,
    seed: int = 0,
) -> ScopedSearch:
    """Make the search of one task, with no pulls yet.

    Args:
        kind: ``tree``, ``flat``, ``random`` or ``exhaustive``.
        tree: the tree over the bank's tasks.
        bank: at least one stored task.
        scope: ``model`` (one search) or ``block`` (the paper: one for every block).
        c: width of the confidence interval in units of the observed deviation of xi.
        delta: how far a node's mean may lie above its best member: ``observed``, from the stored
            tasks as queries; ``median``, the median distance of the node's members to its mean
            (the paper's); or ``bound``, twice the largest such distance. See ``node_deltas``.
        seed: of the random search; the same on all ranks.

    Raises:
        UsageError: an unknown kind, scope or delta.
    """
    for what, value, known in (
        ("search", kind, SEARCHES), ("scope", scope, SCOPES), ("delta", delta, DELTAS),
    ):  # fmt: skip
        if value not in known:
            raise UsageError(f"unknown bandit.{what} {value!r}", did_you_mean(value, list(known)))
    arms, count = len(bank), 1 if scope == "model" else bank.blocks
    if kind == "flat":
        return ScopedSearch([FlatSearch(arms, c) for _ in range(count)])
    if kind == "random":
        return ScopedSearch([RandomSearch(arms, f"{seed}:{block}") for block in range(count)])
    if kind == "exhaustive":
        return ScopedSearch([ExhaustiveSearch(arms) for _ in range(count)])
    deltas = node_deltas(tree, bank, delta, scope)
    return ScopedSearch([TreeSearch(tree, c, one) for one in deltas])
