"""Which earlier task to compare with next: searches behind one small protocol (design 5.1.3).

An arm is a task index; a pull of an arm returns one number xi, smaller is better. All state is
plain Python numbers: a step costs no tensor operation and its state is JSON.

The scale of every bound is sigma, the standard deviation of all xi seen so far. It is refreshed
only when the number of pulls reaches a power of two, and then every bound is renewed; in between
a step of the tree search touches the path and its siblings only, so it is O(depth) exactly and
the renewals add O(log T) passes over the visited nodes in all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from treelora_cli.errors import DivergedError, RunDirError
from treelora_cli.tree.nodes import GradientTree

if TYPE_CHECKING:
    from torch import Tensor

Distances = Callable[[], "Tensor"]
"""Gives the current xi of every arm, [N]; called by the exhaustive search only."""


class Search(Protocol):
    """One search over N arms."""

    def choose(self, distances: Distances) -> int:
        """Return the arm to pull; ``distances`` is called only by searches that look at all."""

    def path(self) -> tuple[int, ...]:
        """Return the node ids from the root to the last chosen leaf; empty without a tree."""

    def update(self, arm: int, xi: float) -> None:
        """Record one pull. It may come any number of steps after ``choose``, in order.

        Raises:
            DivergedError: xi is not a finite number.
        """

    def statistics(self) -> dict[str, Any]:
        """Return ``pulls`` (per arm), ``means`` (mean xi, None unpulled), ``sigma``, ``total``."""

    def state(self) -> dict[str, Any]:
        """Return everything that later choices depend on, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned.

        Raises:
            RunDirError: it is not the state of this kind of search over this many arms.
        """


class _Pulls:
    """What every search counts: pulls and sums per slot, and the running deviation of xi.

    Args:
        kind: name of the search, checked when a state is loaded.
        slots: number of counters (arms, or nodes of a tree).
        known: the deviation of the feedback where it is known; None: the running one.
    """

    def __init__(self, kind: str, slots: int, known: float | None = None) -> None:
        if slots < 1:
            raise ValueError("a search needs at least one arm")
        self.kind = kind
        self._known = known
        self.pulls = [0] * slots
        self.sums = [0.0] * slots
        self.total = 0
        self.sigma = known or 0.0
        self.last: int | None = None
        self._mean = 0.0
        self._squares = 0.0

    def record(self, slots: Sequence[int], xi: float) -> bool:
        """Count one pull in all given slots; return whether sigma was refreshed."""
        if not math.isfinite(xi):
            raise DivergedError(
                "the distance to an earlier task's signature is not a finite number",
                "training has diverged: lower optim.lr or the penalty's weight",
            )
        for slot in slots:
            self.pulls[slot] += 1
            self.sums[slot] += xi
        self.total += 1
        gap = xi - self._mean
        self._mean += gap / self.total
        self._squares += gap * (xi - self._mean)
        if self._known is not None or self.total & (self.total - 1):
            return False
        self.sigma = math.sqrt(max(self._squares, 0.0) / self.total)
        return True

    def summary(self, slots: Sequence[int]) -> dict[str, Any]:
        """Return the statistics of the arms counted in these slots."""
        means = [self.sums[slot] / self.pulls[slot] if self.pulls[slot] else None for slot in slots]
        pulls = [self.pulls[slot] for slot in slots]
        return {"pulls": pulls, "means": means, "sigma": self.sigma, "total": self.total}

    def state(self) -> dict[str, Any]:
        """Return the counters; slots that were never pulled are left out."""
        visited = [slot for slot, count in enumerate(self.pulls) if count]
        return {
            "kind": self.kind,
            "slots": len(self.pulls),
            "total": self.total,
            "sigma": self.sigma,
            "mean": self._mean,
            "squares": self._squares,
            "last": self.last,
            "visited": [[slot, self.pulls[slot], self.sums[slot]] for slot in visited],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over counters, refusing those of another search."""
        try:
            if (state["kind"], state["slots"]) != (self.kind, len(self.pulls)):
                raise ValueError(f"{state['kind']} over {state['slots']} slots")
            self.pulls, self.sums = [0] * len(self.pulls), [0.0] * len(self.pulls)
            for slot, count, total in state["visited"]:
                self.pulls[int(slot)], self.sums[int(slot)] = int(count), float(total)
            self.total, self.sigma = int(state["total"]), float(state["sigma"])
            self._mean, self._squares = float(state["mean"]), float(state["squares"])
            self.last = None if state["last"] is None else int(state["last"])
            if self.last is not None and not 0 <= self.last < len(self.pulls):
                raise ValueError(f"arm {self.last} is out of range")
        except (KeyError, IndexError, TypeError, ValueError) as cause:
            raise RunDirError(
                f"the bandit's state does not fit a {self.kind} search: {cause}",
                "the checkpoint belongs to another recipe or tree; start the task anew",
            ) from None


class _Base:
    """The parts of ``Search`` that do not depend on the rule."""

    def __init__(self, kind: str, slots: int, sigma: float | None = None) -> None:
        self._seen = _Pulls(kind, slots, sigma)

    def path(self) -> tuple[int, ...]:
        """Return an empty path: there is no tree."""
        return ()

    def update(self, arm: int, xi: float) -> None:
        """Record one pull of an arm."""
        self._seen.record((arm,), xi)

    def statistics(self) -> dict[str, Any]:
        """Return pulls and mean xi of every arm, sigma and the total."""
        return self._seen.summary(range(len(self._seen.pulls)))

    def state(self) -> dict[str, Any]:
        """Return the counters as JSON values."""
        return self._seen.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the counters."""
        self._seen.load_state(state)


class TreeSearch(_Base):
    """Optimistic descent of the gradient tree (paper Eq. 2, made well-formed).

    Bound of a leaf: mean - c sigma sqrt(log(1 + t_p) / n). Bound of an inner node:
    max(min over its children, mean - c sigma sqrt(log(1 + t_p) / n) - delta). n are the pulls of
    the node, t_p those of its parent (of the root: its own); a node without pulls counts as
    minus infinity. The descent takes the smaller bound, the left child on ties.

    Args:
        tree: the tree over the arms.
        c: width of the confidence interval in units of sigma (the paper's 2).
        deltas: how far the mean of a node may lie above its best member, by node id, in the unit
            of xi; see ``deltas``.
        sigma: the deviation of the noise where it is known; None: the running one of all xi.
    """

    def __init__(
        self, tree: GradientTree, c: float, deltas: Sequence[float], sigma: float | None = None
    ) -> None:
        super().__init__("tree", len(tree.nodes), sigma)
        if len(deltas) != len(tree.nodes):
            raise ValueError("one delta for every node of the tree")
        self._tree = tree
        self._children = [node.children for node in tree.nodes]
        self._parent = [node.id if node.parent is None else node.parent for node in tree.nodes]
        self._deltas = [float(delta) for delta in deltas]
        self._c = c
        self._bounds = [-math.inf] * len(tree.nodes)

    def choose(self, distances: Distances | None = None) -> int:
        """Return the arm whose leaf the optimistic descent reaches."""
        at = 0
        bounds = self._bounds
        while children := self._children[at]:
            left, right = children
            at = left if bounds[left] <= bounds[right] else right
        arm = self._tree.nodes[at].tasks[0]
        self._seen.last = arm
        return arm

    def path(self) -> tuple[int, ...]:
        """Return the node ids from the root to the last chosen leaf."""
        return () if self._seen.last is None else self._tree.path_to(self._seen.last)

    def update(self, arm: int, xi: float) -> None:
        """Give xi to every node from the root to the arm's leaf and renew their bounds."""
        path = self._tree.path_to(arm)
        if self._seen.record(path, xi):
            self._renew_all()
            return
        for at in reversed(path[:-1]):
            for child in self._children[at]:
                self._renew(child)
        self._renew(0)

    def bound(self, node: int) -> float:
        """Return the current lower confidence bound of a node; minus infinity if never pulled."""
        return self._bounds[node]

    def statistics(self) -> dict[str, Any]:
        """Return pulls and mean xi of every arm, sigma and the total."""
        return self._seen.summary(self._tree.leaves)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the counters and work the bounds out from them."""
        super().load_state(state)
        self._renew_all()

    def _renew_all(self) -> None:
        self._bounds = [-math.inf] * len(self._bounds)
        # Pre-order: going down the ids, children come before their parent.
        for at in range(len(self._bounds) - 1, -1, -1):
            if self._seen.pulls[at]:
                self._renew(at)

    def _renew(self, at: int) -> None:
        seen = self._seen
        n = seen.pulls[at]
        if not n:
            return
        log = math.log(1 + seen.pulls[self._parent[at]])
        own = seen.sums[at] / n - self._c * seen.sigma * math.sqrt(log / n)
        children = self._children[at]
        if children:
            best = min(self._bounds[children[0]], self._bounds[children[1]])
            own = max(best, own - self._deltas[at])
        self._bounds[at] = own


class FlatSearch(_Base):
    """Lower confidence bound over all arms without a tree: mean - c sigma sqrt(log(1 + t) / n).

    Arms without pulls come first, the lowest index on ties. A step is O(N), in one array.

    Args:
        arms: number of arms N.
        c: width of the confidence interval in units of sigma.
        sigma: as for ``TreeSearch``.
    """

    def __init__(self, arms: int, c: float, sigma: float | None = None) -> None:
        super().__init__("flat", arms, sigma)
        self._c = c
        self._means = np.full(arms, -math.inf)
        self._counts = np.ones(arms)

    def choose(self, distances: Distances | None = None) -> int:
        """Return the arm with the smallest bound."""
        width = self._c * self._seen.sigma
        bonus = width * np.sqrt(math.log(1 + self._seen.total) / self._counts)
        self._seen.last = int(np.argmin(self._means - bonus))
        return self._seen.last

    def update(self, arm: int, xi: float) -> None:
        """Record one pull of an arm."""
        super().update(arm, xi)
        self._refresh(arm)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the counters."""
        super().load_state(state)
        self._means[:], self._counts[:] = -math.inf, 1
        for arm, count in enumerate(self._seen.pulls):
            if count:
                self._refresh(arm)

    def _refresh(self, arm: int) -> None:
        self._counts[arm] = self._seen.pulls[arm]
        self._means[arm] = self._seen.sums[arm] / self._seen.pulls[arm]


class RandomSearch(_Base):
    """Every arm with the same probability.

    Draw number i depends on the seed and i alone, so the state is one counter, and all ranks and
    a resumed run draw the same arms.

    Args:
        arms: number of arms N.
        seed: any integer, or text that names the stream of draws.
    """

    def __init__(self, arms: int, seed: int | str) -> None:
        super().__init__("random", arms)
        self._arms = arms
        self._seed = seed
        self._draws = 0

    def choose(self, distances: Distances | None = None) -> int:
        """Return the next draw."""
        self._seen.last = random.Random(f"{self._seed}:{self._draws}").randrange(self._arms)
        self._draws += 1
        return self._seen.last

    def state(self) -> dict[str, Any]:
        """Return the counters and the number of draws."""
        return {**super().state(), "draws": self._draws}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the counters and the number of draws."""
        super().load_state(state)
        self._draws = int(state.get("draws", self._seen.total))


class ExhaustiveSearch(_Base):
    """The arm that is nearest now, by looking at all of them.

    Args:
        arms: number of arms N.
    """

    def __init__(self, arms: int) -> None:
        super().__init__("exhaustive", arms)

    def choose(self, distances: Distances) -> int:
        """Return the arm with the smallest current xi, the lowest index on ties."""
        self._seen.last = int(distances().argmin())
        return self._seen.last
