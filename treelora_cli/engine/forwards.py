"""The forward passes of each optimizer step: its rows grouped by length, so that little is padding.

Grouping changes no gradient but by rounding: a step's loss is the mean over all its answer tokens,
however they are spread over passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora_cli.engine.batches import RowPlan
from treelora_cli.models.encode import Batch, Example, collate, pack
from treelora_cli.models.grouping import group_by_length, group_by_sides
from treelora_cli.recipe import OptimSection

# Beyond so many tokens a pass is no faster; on a CPU it is slower, for its activations leave the
# caches and are new memory every time.
AUTO_TOKENS = {"cpu": 1024, "cuda": 16384}


def pass_tokens(optim: OptimSection, device: str) -> int | None:
    """Return the most tokens of a forward pass, or None for no limit.

    Args:
        optim: the recipe's ``optim`` section.
        device: ``cpu`` or ``cuda``.
    """
    wanted = optim.micro_batch_tokens
    return AUTO_TOKENS.get(device, AUTO_TOKENS["cuda"]) if wanted == "auto" else wanted


class Forwards:
    """The batches of every optimizer step of a task.

    Args:
        examples: the training rows.
        plan: which rows each step sees.
        optim: the limits of a forward pass.
        pad: the padding token's id.
        device: ``cpu`` or ``cuda``, for limits that depend on it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: RowPlan,
        optim: OptimSection,
        pad: int,
        device: str = "cpu",
    ) -> None:
        self.examples = examples
        self.plan = plan
        self._optim = optim
        self._pad = pad
        self._tokens = pass_tokens(optim, device)

    def of(self, step: int) -> list[Batch]:
        """Return the batches of an optimizer step, on the host.

        Args:
            step: from 0, over all epochs.
        """
        return self.batches([self.examples[row] for row in self.plan.rows(step)])

    def batches(self, rows: Sequence[Example]) -> list[Batch]:
        """Return the batches of any rows, on the host, within the limits of a forward pass."""
        join = pack if self._optim.packing else collate
        return [join([rows[at] for at in group], self._pad) for group in self._groups(rows)]

    def per_epoch(self) -> int:
        """Return the most forward passes that an epoch takes; another order may need fewer."""
        passes = [0] * (self.plan.epoch_of(self.plan.steps - 1) + 1)
        for step in range(self.plan.steps):
            rows = [self.examples[row] for row in self.plan.rows(step)]
            passes[self.plan.epoch_of(step)] += len(self._groups(rows))
        return max(passes)

    def _groups(self, rows: Sequence[Example]) -> list[list[int]]:
        optim = self._optim
        if rows[0].apart:
            sides = [row.sides for row in rows]
            return group_by_sides(sides, optim.micro_batch_size, self._tokens)
        lengths = [len(row.tokens) for row in rows]
        return group_by_length(lengths, optim.micro_batch_size, self._tokens, packed=optim.packing)

    def passes(self, rows: Sequence[Example]) -> int:
        """Return how many forward passes rows take."""
        return len(self._groups(rows))
