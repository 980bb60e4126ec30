"""Which rows each optimizer step sees: a function of seed and step alone, so resuming is exact."""

from __future__ import annotations

import torch

from treelora_cli.engine.seeds import derive


class BatchPlan:
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

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def forwards_per_epoch(self, micro_batch_size: int) -> int:
        """Return the forward passes of one epoch, each of so many rows at the most."""
        sizes = (len(self.rows(step)) for step in range(self.steps_per_epoch))
        return sum(-(-size // micro_batch_size) for size in sizes)

    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step."""
        epoch = self.epoch_of(step)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._order = (epoch, torch.randperm(self.count, generator=generator).tolist())
        start = (step % self.steps_per_epoch) * self.batch_size
        return self._order[1][start : start + self.batch_size]
