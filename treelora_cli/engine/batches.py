"""Which rows each optimizer step sees: a function of seed and step alone, so resuming is exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from treelora_cli.engine.seeds import derive


class RowPlan(ABC):
    """The rows of every step.

    Attributes:
        steps: optimizer steps in all.
        steps_per_epoch: optimizer steps of one epoch.
    """

    steps: int
    steps_per_epoch: int

    @abstractmethod
    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step."""

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch


class BatchPlan(RowPlan):
    """The order of rows over all epochs of one task.

    Every epoch visits every row once, in an order of its own; the last batch of an epoch may be
    smaller.

    Args:
        rows: number of rows, at least 1.
        batch_size: rows an optimizer step.
        epochs: passes over the rows.
        seed: decides the order.
    """

    def __init__(self, rows: int, batch_size: int, epochs: int, seed: int) -> None:
        self.count = rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-rows // batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._order: tuple[int, list[int]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step."""
        epoch = self.epoch_of(step)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._order = (epoch, torch.randperm(self.count, generator=generator).tolist())
        start = (step % self.steps_per_epoch) * self.batch_size
        return self._order[1][start : start + self.batch_size]


class NoPlan(RowPlan):
    """No step at all, for what learns nothing."""

    steps = 0
    steps_per_epoch = 1

    def rows(self, step: int) -> list[int]:
        """Return no rows."""
        return []

    def epoch_of(self, step: int) -> int:
        """Return 0."""
        return 0


class ThenPlan(RowPlan):
    """One plan after another, over rows that stand behind one another.

    Args:
        first: over the first rows; its epochs count as they are.
        count: how many rows it has.
        then: over the rows behind them; one more epoch.
    """

    def __init__(self, first: RowPlan, count: int, then: RowPlan) -> None:
        self._first, self._count, self._then = first, count, then
        self.steps = first.steps + then.steps
        self.steps_per_epoch = first.steps_per_epoch

    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step."""
        if step < self._first.steps:
            return self._first.rows(step)
        return [self._count + row for row in self._then.rows(step - self._first.steps)]

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to."""
        first = self._first
        if step < first.steps:
            return first.epoch_of(step)
        return first.epoch_of(first.steps - 1) + 1


class UnionPlan(RowPlan):
    """The rows of several tasks shuffled together, in one epoch.

    A task's rows occur as often as it has epochs. There are as many steps as the tasks would take
    one after the other; where their last batches would have been smaller, all batches are, by a
    row or so, since the occurrences are spread evenly.

    Args:
        rows: number of rows of each task; they are numbered through.
        batch_size: the most rows an optimizer step.
        epochs: passes over each task's rows.
        seed: decides the order.
    """

    def __init__(
        self, rows: Sequence[int], batch_size: int, epochs: Sequence[int], seed: int
    ) -> None:
        self.steps = sum(-(-n // batch_size) * e for n, e in zip(rows, epochs, strict=True))
        self.steps_per_epoch = self.steps
        counts = torch.tensor(epochs).repeat_interleave(torch.tensor(rows))
        occurrences = torch.arange(sum(rows)).repeat_interleave(counts)
        generator = torch.Generator().manual_seed(derive(seed, "union"))
        order = torch.randperm(len(occurrences), generator=generator)
        self._order: list[int] = occurrences[order].tolist()

    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step."""
        total = len(self._order)
        return self._order[step * total // self.steps : (step + 1) * total // self.steps]
