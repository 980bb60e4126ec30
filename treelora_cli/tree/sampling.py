"""Where the tree looks at a sample instead of at everything, so that large streams stay quick.

Nothing is sampled while a bank holds at most ``EXACT_TASKS`` tasks. Above that, means over many
tasks are taken of evenly spaced ones, and comparisons of whole banks of evenly spaced entries.
Samples depend on counts alone, never on chance: the same stream gives the same tree everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

EXACT_TASKS = 256
"""Up to this many tasks everything is exact; means over more tasks come from 129 to 256 of them."""

EXACT_MEMBERS = 16
"""In a larger bank a group's radius and median come from at most this many of its members."""

SUMMED_MEMBERS = 32
"""In a larger bank the sum over a group of more members than this is kept."""

ENTRIES = 128
"""Entries of a block that are compared where all tasks of a larger bank are."""


def evenly(tasks: Sequence[int], limit: int) -> Sequence[int]:
    """Return at most ``limit`` of some tasks, evenly spaced from the first; all if they are few.

    The step is a power of two, so that a sequence that grows keeps its sample for a while: at n
    tasks and step s only one addition in s changes it.
    """
    step = 1
    while -(-len(tasks) // step) > limit:
        step *= 2
    return tasks if step == 1 else tasks[::step]


@functools.lru_cache(maxsize=32)
def some_entries(widths: tuple[int, ...], limit: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return at most ``limit`` evenly spaced entries of each block.

    The step is odd: an even one would meet the same few columns of every row of a weight matrix.

    Args:
        widths: F_d.
        limit: entries a block.

    Returns:
        positions among the F entries, int64, and how many of each block.
    """
    chosen, counts, start = [], [], 0
    for width in widths:
        step = -(-width // limit)
        if step > 1:
            step |= 1
        found = torch.arange(start, start + width, step)
        chosen.append(found)
        counts.append(len(found))
        start += width
    return torch.cat(chosen), tuple(counts)
