"""How work on rows is spread over the processes that train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Spread:
    """A process's part of what all processes do together.

    Attributes:
        rank: the process's number, from 0.
        size: how many there are.
        sum: adds up all processes' values in place, to the same bits everywhere.
    """

    rank: int = 0
    size: int = 1
    sum: Callable[[Tensor], Tensor] = _as_it_is

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's items."""
        return items[self.rank :: self.size]

    def dealt(self, groups: Sequence[Sequence[T]]) -> Iterator[Sequence[T]]:
        """Yield this process's groups; an empty one at the end where another has one more.

        All processes get equally many, so that they can meet after each.
        """
        for start in range(0, len(groups), self.size):
            at = start + self.rank
            yield groups[at] if at < len(groups) else ()


ALL = Spread()
"""One process does everything."""
