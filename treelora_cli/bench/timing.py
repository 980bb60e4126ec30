"""Time two arms side by side, and say how sure the ratio is.

Arms alternate within one process and their order flips with every pair, so that whatever slows the
machine down (a neighbour, heat, a growing heap) meets both alike; the ratio is taken pair by pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 2000
SHARE = 0.95

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms timed in pairs.

    Attributes:
        first: median seconds of the first arm.
        second: median seconds of the second arm.
        ratio: median over the pairs of second / first.
        low: lower end of the ratio's 95 % bootstrap interval.
        high: its upper end.
        pairs: how many pairs.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float
    pairs: int


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Sum up the times of two arms, given pair by pair.

    Args:
        first: seconds of the first arm, one a pair.
        second: seconds of the second arm, of the same pairs.
        seed: of the bootstrap.

    Raises:
        ValueError: no pair, or arms of unequal length.
    """
    ratios = [two / one for one, two in zip(first, second, strict=True)]
    low, high = bootstrap_median(ratios, seed)
    return Comparison(
        statistics.median(first),
        statistics.median(second),
        statistics.median(ratios),
        low,
        high,
        len(ratios),
    )


def bootstrap_median(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the median.

    With fewer than six values no such interval has 95 %: it is then the range of the values.

    Args:
        values: the sample.
        seed: of the resampling.

    Raises:
        ValueError: an empty sample.
    """
    if not values:
        raise ValueError("a bootstrap needs at least one value")
    if len(values) < 6:
        return min(values), max(values)
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    medians = np.median(sample[draws], axis=1)
    low, high = np.quantile(medians, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def alternate(
    first: Work,
    second: Work,
    pairs: int,
    *,
    warmup: int = 3,
    steps: int = 1,
    wait: Work = lambda: None,
    limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Run two arms alternately, the order flipped with every pair.

    Args:
        first: one step of the first arm.
        second: one step of the second arm.
        pairs: how many pairs are timed.
        warmup: pairs before these, not timed.
        steps: steps a timed chunk; more than one where work runs on after a call returns.
        wait: returns when the device has nothing left to do; called at both ends of a chunk.
        limit: seconds after which no new pair is begun; at least one is timed.
        clock: gives seconds.

    Returns:
        Seconds a step of the first and of the second arm, pair by pair.
    """
    arms = (first, second)
    times: tuple[list[float], list[float]] = ([], [])
    began = clock()
    for number in range(-warmup, pairs):
        if number > 0 and limit is not None and clock() - began > limit:
            break
        for arm in (0, 1) if number % 2 == 0 else (1, 0):
            seconds = _chunk(arms[arm], steps, wait, clock)
            if number >= 0:
                times[arm].append(seconds)
    return times


def repeated(
    work: Work, times: int, wait: Work = lambda: None, limit: float | None = None
) -> list[float]:
    """Return the seconds of every repetition of one piece of work.

    Args:
        work: what is timed.
        times: how often.
        wait: returns when the device has nothing left to do.
        limit: seconds after which no new repetition is begun.
    """
    found: list[float] = []
    while len(found) < times and (limit is None or sum(found) <= limit):
        found.append(_chunk(work, 1, wait, time.perf_counter))
    return found


def _chunk(work: Work, steps: int, wait: Work, clock: Callable[[], float]) -> float:
    wait()
    began = clock()
    for _ in range(steps):
        work()
    wait()
    return (clock() - began) / steps


def waiter(device: torch.device) -> Work:
    """Return what waits for a device to finish."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
