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


def group_by_sides(
    sides: Sequence[tuple[int, int]], rows: int, tokens: int | None
) -> list[list[int]]:
    """Group prompts and answers that are padded apart, so that little padding stands on both sides.

    No order suits both sides at once; of those by prompt, by answer and by both together the one
    with the fewest tokens to compute is taken.

    Args:
        sides: tokens of each prompt and of its answer.
        rows: most rows a pass.
        tokens: most tokens a pass, padding on both sides counted; a single longer row is a pass of
            its own. None: no limit.

    Returns:
        The rows' numbers, pass by pass.
    """
    numbers = range(len(sides))
    orders = [
        sorted(numbers, key=lambda at: (-sides[at][0], -sides[at][1], at)),
        sorted(numbers, key=lambda at: (-sides[at][1], -sides[at][0], at)),
        sorted(numbers, key=lambda at: (-sum(sides[at]), -sides[at][0], at)),
    ]
    ways = [_fill(sides, order, rows, tokens) for order in orders]
    return min(ways, key=lambda groups: sum(_area(sides, group) for group in groups))


def _area(sides: Sequence[tuple[int, int]], group: Sequence[int]) -> int:
    """Return the tokens of a pass, padding counted."""
    prompts, answers = zip(*(sides[at] for at in group), strict=True)
    return len(group) * int(max(prompts) + max(answers))


def _fill(
    sides: Sequence[tuple[int, int]], order: Sequence[int], rows: int, tokens: int | None
) -> list[list[int]]:
    groups: list[list[int]] = []
    for number in order:
        wider = [*groups[-1], number] if groups else []
        if not wider or len(wider) > rows or (tokens and _area(sides, wider) > tokens):
            groups.append([number])
        else:
            groups[-1] = wider
    return groups
