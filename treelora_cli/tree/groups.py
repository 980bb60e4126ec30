"""What a group of tasks is made of: its two sides, how wide it is, its mean signature."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from treelora_cli.tree import sampling
from treelora_cli.tree.nodes import Group
from treelora_cli.tree.signatures import SignatureBank, block_means
from treelora_cli.tree.splits import SPLITS, axis_share, axis_shares


def grow(top: Group, depth: int, bank: SignatureBank, split: str, block_rule: str) -> None:
    """Cut a group, then its sides, down to single tasks; a stack, since chains may be long.

    In a bank of more than ``sampling.EXACT_TASKS`` tasks the block of a cut is chosen by
    ``sampling.ENTRIES`` evenly spaced entries of each; the cut itself looks at the whole block.

    Args:
        top: the group, not yet cut; it and its sides are filled in.
        depth: its distance from the root.
        bank: the signatures.
        split: as in ``build.build_tree``.
        block_rule: as in ``build.build_tree``.
    """
    offsets = [0, *torch.tensor(bank.widths).cumsum(0).tolist()]
    shares = _shares_of(bank, top.tasks, offsets)
    pending = [(top, depth)]
    while pending:
        group, level = pending.pop()
        if len(group.tasks) == 1:
            continue
        block, spread = min(level, bank.blocks - 1), None
        if block_rule == "spread":
            spreads = shares(group.tasks)
            block = max(range(bank.blocks), key=lambda d: (round(spreads[d], 6), -d))
            spread = spreads[block]
        rows = bank.values[:, offsets[block] : offsets[block + 1]][list(group.tasks)]
        cut = SPLITS[split](rows)
        group.split = split if cut.threshold is not None else "index"
        group.block, group.threshold = block, cut.threshold
        group.spread = axis_share(rows) if spread is None else spread
        tasks = group.tasks
        group.children = tuple(
            Group(tuple(tasks[i] for i in side)) for side in (cut.left, cut.right)
        )
        pending.extend((child, level + 1) for child in group.children)


class _Exact:
    """How much some tasks spread at each block, from all entries."""

    def __init__(self, bank: SignatureBank, offsets: list[int]) -> None:
        self._bank = bank
        self._offsets = offsets

    def __call__(self, tasks: Sequence[int]) -> list[float]:
        values, some = self._bank.values, list(tasks)
        return [axis_share(values[:, start:end][some]) for start, end in pairwise(self._offsets)]


class _Sampled:
    """The same from evenly spaced entries, all blocks at once: one of ten thousand groups."""

    def __init__(self, bank: SignatureBank, tasks: Sequence[int]) -> None:
        columns, counts = sampling.some_entries(bank.widths, sampling.ENTRIES)
        rows = bank.values[torch.tensor(tasks).unsqueeze(1), columns].double()
        self._places = {task: place for place, task in enumerate(tasks)}
        self._counts = torch.tensor(counts)
        # Narrow blocks are filled up with zeros, which spread nowhere.
        blocks = torch.zeros(len(tasks), len(counts), max(counts), dtype=torch.float64)
        for block, part in enumerate(torch.split(rows, list(counts), dim=1)):
            blocks[:, block, : counts[block]] = part
        self._blocks = blocks

    def __call__(self, tasks: Sequence[int]) -> list[float]:
        rows = self._blocks[[self._places[task] for task in tasks]]
        return axis_shares(rows.movedim(1, 0), self._counts)


def _shares_of(bank: SignatureBank, tasks: Sequence[int], offsets: list[int]) -> _Exact | _Sampled:
    if len(bank) <= sampling.EXACT_TASKS:
        return _Exact(bank, offsets)
    return _Sampled(bank, tasks)


def below(top: Group) -> Iterator[Group]:
    """Go through a group and all groups below it, in pre-order."""
    pending = [top]
    while pending:
        group = pending.pop()
        yield group
        pending.extend(reversed(group.children))


def seen_members(tasks: Sequence[int], bank: SignatureBank) -> Sequence[int]:
    """Return the tasks of a group that radius and median come from.

    All of them in a bank of at most ``sampling.EXACT_TASKS`` tasks, else at most
    ``sampling.EXACT_MEMBERS``, evenly spaced.
    """
    if len(bank) <= sampling.EXACT_TASKS:
        return tasks
    return sampling.evenly(tasks, sampling.EXACT_MEMBERS)


def measure(group: Group, bank: SignatureBank, scales: Tensor) -> None:
    """Fill in a group's radius and median.

    Of a sample of the members they describe the sample and its mean: the median is within a few
    hundredths of the whole group's, the radius misses what lies further out than the sample.

    Args:
        group: the group.
        bank: the signatures.
        scales: c_d, [D].
    """
    members = seen_members(group.tasks, bank)
    if len(members) == 1:
        group.radius = group.median = 0.0
        return
    if len(bank) <= sampling.EXACT_TASKS:
        distances = member_distances(bank, members, scales)
    else:
        rows = bank.values[list(members)]
        distances = block_means(rows.sub_(rows.mean(0)).abs_(), bank.widths) / scales
    spans = distances.mean(1).tolist()
    group.radius, group.median = max(spans), statistics.median(spans)


def member_distances(bank: SignatureBank, tasks: Sequence[int], scales: Tensor) -> Tensor:
    """Return float32 [n, D]: scaled distance of each member to the group's mean, per block.

    Args:
        bank: the signatures.
        tasks: the group's members.
        scales: c_d, [D].
    """
    return bank.block_distances(bank.mean(tasks), tasks) / scales


def group_mean(group: Group, bank: SignatureBank) -> Tensor:
    """Return the mean signature of a group's members, float32 [F] on the host.

    In a bank of more than ``sampling.EXACT_TASKS`` tasks it is added up in float64, one member
    after the other, so that a sum that has grown and one made anew agree to the last bit. The sum
    over a group of more than ``sampling.SUMMED_MEMBERS`` is kept with it: in all about a
    sixteenth of the tasks times 8 F bytes.
    """
    if len(bank) <= sampling.EXACT_TASKS:
        return bank.mean(group.tasks)
    total = group.total
    if total is None:
        total = torch.zeros(bank.entries, dtype=torch.float64)
        for task in group.tasks:
            total += bank.values[task]
    if len(group.tasks) > sampling.SUMMED_MEMBERS:
        group.total = total
    return (total / len(group.tasks)).float()
