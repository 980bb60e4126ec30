"""The forward passes of each optimizer step: its rows grouped by length, so that little is padding.

Grouping changes no gradient but by rounding: a step's loss is the mean over all its answer tokens,
however they are spread over passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora_cli.engine.batches import RowPlan
from treelora_cli.models.encode import Batch, Example, collate, pack
from treelora_cli.recipe import OptimSection


def group_by_length(
    lengths: Sequence[int], rows: int, tokens: int | None, *, packed: bool = False
) -> list[list[int]]:
    """Group sequences into passes, longest first.

    Args:
        lengths: tokens of each sequence.
        rows: most sequences a pass.
        tokens: most tokens a pass, padding to the longest counted unless ``packed``; a single
            longer sequence is a pass of its own. None: no limit.
        packed: sequences stand behind one another instead of below one another.

    Returns:
        The sequences' numbers, pass by pass; equal lengths keep their order.
    """
    groups: list[list[int]] = []
    used = 0
    for number in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        # Longest first: the first of a group is the width that all its rows are padded to.
        cost = lengths[number] if packed or not groups else lengths[groups[-1][0]]
        full = not groups or len(groups[-1]) == rows or (tokens and used + cost > tokens)
        if full:
            groups.append([])
            used, cost = 0, lengths[number]
        groups[-1].append(number)
        used += cost
    return groups


class Forwards:
    """The batches of every optimizer step of a task.

    Args:
        examples: the training rows.
        plan: which rows each step sees.
        optim: the limits of a forward pass.
        pad: the padding token's id.
    """

    def __init__(
        self, examples: Sequence[Example], plan: RowPlan, optim: OptimSection, pad: int
    ) -> None:
        self.examples = examples
        self.plan = plan
        self._optim = optim
        self._pad = pad

    def of(self, step: int) -> list[Batch]:
        """Return the batches of an optimizer step, on the host.

        Args:
            step: from 0, over all epochs.
        """
        rows = [self.examples[row] for row in self.plan.rows(step)]
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
        lengths = [len(row.tokens) for row in rows]
        optim = self._optim
        return group_by_length(
            lengths, optim.micro_batch_size, optim.micro_batch_tokens, packed=optim.packing
        )
