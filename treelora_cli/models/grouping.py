"""Sequences of similar length together, within a budget of rows and of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(
    lengths: Sequence[int], rows: int, tokens: int | None, *, packed: bool = False
) -> list[list[int]]:
    """Group sequences into forward passes, longest first.

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
