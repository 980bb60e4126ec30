"""How a group of tasks is cut in two, from their signatures at one block.

Every rule returns positions in the group, left side first, and the threshold in its own
coordinate. Values that differ by rounding only count as equal, and what a rule cannot tell apart
is cut by task index, so that the same signatures give the same tree everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.tree import sampling

# Passes over a large group's entries that refine the axis found from a sample of them.
_POWER_STEPS = 3
_COLUMNS = 1 << 14

# Coordinates are compared in steps of this share of their range.
_RESOLUTION = 1 << 20
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Cut:
    """Two non-empty sides of a group.

    Attributes:
        left: positions in the group, ascending.
        right: the other positions, ascending.
        threshold: the cut in the rule's coordinate; None when the group was cut by task index.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    threshold: float | None


def principal(rows: Tensor) -> Cut:
    """Cut at the largest gap along the group's first principal axis.

    The coordinate is the projection of the centred signature on the axis; the left side is below
    the threshold. Only gaps in the middle half are considered (each side keeps at least a quarter
    of the group), so the depth stays logarithmic; among equal gaps the most balanced wins. The
    axis points away from the group's first task (or the next, if that lies at the mean).

    Args:
        rows: float32 [n, F_d], n >= 2.
    """
    n = rows.shape[0]
    centred = rows - rows.mean(0)
    along = _principal_coordinates(centred)
    noise = _ROUNDING * float(rows.double().norm() / n**0.5)
    levels = _levels(along, noise)
    if levels is None:
        return _by_index(n)
    rounding = (max(along) - min(along)) / _RESOLUTION
    if next(value for value in along if abs(value) > rounding) > 0:
        along = [-value for value in along]
        levels = [-level for level in levels]
    order = sorted(range(n), key=lambda i: (levels[i], i))
    gaps = {
        size: levels[order[size]] - levels[order[size - 1]]
        for size in range(-(-n // 4), 3 * n // 4 + 1)
    }
    # Two gaps that are equal may differ by a step at either end.
    least = max(gaps.values()) - 2
    widest = [size for size, gap in gaps.items() if gap >= least]
    size = min(widest, key=lambda m: (abs(2 * m - n), m))
    below, above = along[order[size - 1]], along[order[size]]
    return _sides(order[:size], order[size:], (below + above) / 2)


def paper(rows: Tensor) -> Cut:
    """Cut at the median L1 distance to the group's mean (the paper's Eq. 1 and section 3.3).

    The coordinate is the per-entry mean distance; the left side (the core) is at most the lower
    median away, the right side (the rim) more. Equal distances are cut by task index.

    Args:
        rows: float32 [n, F_d], n >= 2.
    """
    n = rows.shape[0]
    distances = (rows - rows.mean(0)).abs().mean(1).double().tolist()
    levels = _levels(distances, _ROUNDING * float(rows.abs().mean()))
    if levels is None:
        return _by_index(n)
    order = sorted(range(n), key=lambda i: (levels[i], i))
    size = n - n // 2
    return _sides(order[:size], order[size:], distances[order[size - 1]])


def official(rows: Tensor) -> Cut:
    """Cut at the lower median dot product with the group's mean (the released code's rule).

    The coordinate is the dot product; the left side is at or above the threshold. Two tasks, and
    groups whose dot products are equal, leave the right side empty and are cut by task index.

    Args:
        rows: float32 [n, F_d], n >= 2.
    """
    n = rows.shape[0]
    similarities = (rows.double() @ rows.double().mean(0)).tolist()
    size = max(abs(value) for value in similarities)
    levels = _levels(similarities, _ROUNDING * size)
    if levels is None:
        return _by_index(n)
    middle = sorted(range(n), key=lambda i: (levels[i], i))[(n - 1) // 2]
    left = [i for i in range(n) if levels[i] >= levels[middle]]
    right = [i for i in range(n) if levels[i] < levels[middle]]
    return _sides(left, right, similarities[middle]) if right else _by_index(n)


def axis_share(rows: Tensor) -> float:
    """Return how much the group spreads along one axis, relative to what chance would show.

    It is the first principal axis' share of the variance, over the share it would have if the
    rows were independent noise of the same shape (the edge of the Marchenko-Pastur law): about 1
    for a block that does not tell the tasks apart, however large or wide the block is, and more
    the clearer its groups are. 0 when all rows are equal.

    Args:
        rows: float32 [n, F_d], n >= 2.
    """
    n, width = rows.shape
    centred = rows - rows.mean(0)
    variance = float(centred.double().square().sum())
    if variance <= _ROUNDING**2 * float(rows.double().square().sum()):
        return 0.0
    first = variance
    if n > 2:
        first = sum(value * value for value in _principal_coordinates(centred))
    few, many = sorted((n - 1, width))
    by_chance = min(1.0, (1 + math.sqrt(few / many)) ** 2 / few)
    return first / variance / by_chance


def axis_shares(blocks: Tensor, widths: Tensor) -> list[float]:
    """Return ``axis_share`` of the same tasks at D blocks, all at once.

    Args:
        blocks: float64 [D, n, W], n >= 2; a block of fewer entries than W is filled up with zeros.
        widths: [D], the number of entries of each block.
    """
    n, width = blocks.shape[1:]
    centred = blocks - blocks.mean(1, keepdim=True)
    variance = centred.square().sum((1, 2))
    equal = variance <= _ROUNDING**2 * blocks.square().sum((1, 2))
    first = variance
    if n > 2:
        gram = centred @ centred.mT if n <= width else centred.mT @ centred
        first = torch.linalg.eigvalsh(gram)[:, -1]
    by_chance = (widths.double().rsqrt() + (n - 1) ** -0.5).square().clamp(max=1)
    shares: list[float] = torch.where(equal, 0.0, first / variance / by_chance).tolist()
    return shares


SPLITS: dict[str, Callable[[Tensor], Cut]] = {
    "principal": principal,
    "paper": paper,
    "official": official,
}


def _sides(left: list[int], right: list[int], threshold: float) -> Cut:
    return Cut(tuple(sorted(left)), tuple(sorted(right)), threshold)


def _by_index(n: int) -> Cut:
    half = n - n // 2
    return Cut(tuple(range(half)), tuple(range(half, n)), None)


def _levels(values: list[float], noise: float) -> list[int] | None:
    """Return the values in whole steps of their range; None when they all count as equal."""
    low, high = min(values), max(values)
    span = high - low
    if span <= noise:
        return None
    return [round((value - low) / span * _RESOLUTION) for value in values]


def _principal_coordinates(centred: Tensor) -> list[float]:
    """Return the projections [n] of centred rows [n, F_d] on their first principal axis."""
    n, width = centred.shape
    if n == 2:
        half = float(centred[0].double().norm())
        return [-half, half]
    if n > sampling.EXACT_TASKS:
        return _iterated_coordinates(centred)
    if n <= width:
        gram = torch.zeros(n, n, dtype=torch.float64)
        for start in range(0, width, _COLUMNS):
            wide = centred[:, start : start + _COLUMNS].double()
            gram += wide @ wide.T
        values, vectors = torch.linalg.eigh(gram)
        scaled: list[float] = (vectors[:, -1] * values[-1].clamp(min=0).sqrt()).tolist()
        return scaled
    wide = centred.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    along: list[float] = (wide @ vectors[:, -1]).tolist()
    return along


def _iterated_coordinates(centred: Tensor) -> list[float]:
    """Approximate the projections: exact for a sample of the entries, then power iteration.

    The start is the principal axis of evenly spaced entries (or the longest row where those do
    not differ), so a few passes over all entries do; nothing is drawn at random.
    """
    columns, _ = sampling.some_entries((centred.shape[1],), sampling.ENTRIES)
    some = centred[:, columns].double()
    _, vectors = torch.linalg.eigh(some.T @ some)
    along = (some @ vectors[:, -1]).float()
    if not bool(along.any()):
        along = centred @ centred[int(centred.norm(dim=1).argmax())]
    for _ in range(_POWER_STEPS):
        axis = along @ centred
        along = centred @ (axis / axis.norm().clamp(min=1e-30))
    coordinates: list[float] = along.double().tolist()
    return coordinates
