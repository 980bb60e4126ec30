"""The statistics: pairs, their order, medians, the bootstrap. No test looks at a real clock."""

from __future__ import annotations

import pytest

from treelora_cli.bench.timing import alternate, bootstrap_median, compare, repeated


class FakeClock:
    """Time that passes only when an arm says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def arm(self, name: str, *seconds: float):
        left = list(seconds)

        def work() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work

    def wait(self) -> None:
        self.log.append("|")


def test_order_flips_with_every_pair() -> None:
    clock = FakeClock()
    alternate(clock.arm("a", 1), clock.arm("b", 1), 4, warmup=0, clock=clock)
    assert "".join(clock.log) == "abbaabba"


def test_flipping_goes_on_from_the_warm_up() -> None:
    clock = FakeClock()
    first, second = alternate(clock.arm("a", 1), clock.arm("b", 1), 2, warmup=3, clock=clock)
    assert "".join(clock.log) == "baabba" + "abba"
    assert (len(first), len(second)) == (2, 2)


def test_times_belong_to_their_arm_and_pair() -> None:
    clock = FakeClock()
    first, second = alternate(
        clock.arm("a", 9, 1, 2, 3), clock.arm("b", 90, 10, 20, 30), 3, warmup=1, clock=clock
    )
    assert first == [1, 2, 3]
    assert second == [10, 20, 30]


def test_a_chunk_waits_at_both_ends_and_is_counted_by_the_step() -> None:
    clock = FakeClock()
    first, second = alternate(
        clock.arm("a", 2), clock.arm("b", 5), 2, warmup=0, steps=3, wait=clock.wait, clock=clock
    )
    assert "".join(clock.log) == "|aaa||bbb|" + "|bbb||aaa|"
    assert (first, second) == ([2, 2], [5, 5])


def test_work_that_runs_on_after_the_call_is_timed_by_waiting() -> None:
    clock = FakeClock()
    pending = [0.0]

    def launch() -> None:
        pending[0] += 4

    def finish() -> None:
        clock.now += pending[0]
        pending[0] = 0

    first, second = alternate(launch, lambda: None, 2, warmup=0, wait=finish, clock=clock)
    assert (first, second) == ([4, 4], [0, 0])


def test_a_limit_ends_after_a_whole_pair_and_one_is_always_timed() -> None:
    clock = FakeClock()
    first, second = alternate(
        clock.arm("a", 1), clock.arm("b", 1), 100, warmup=0, limit=5.0, clock=clock
    )
    assert len(first) == len(second) == 3
    short = alternate(clock.arm("a", 9), clock.arm("b", 9), 5, warmup=0, limit=0.0, clock=clock)
    assert [len(times) for times in short] == [1, 1]


def test_the_ratio_is_taken_pair_by_pair() -> None:
    found = compare([1.0, 10.0, 100.0], [2.0, 15.0, 300.0])
    assert (found.first, found.second) == (10.0, 15.0)
    assert found.ratio == 2.0  # the ratio of the medians would be 1.5
    assert (found.low, found.high) == (1.5, 3.0)
    assert found.pairs == 3


def test_arms_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([1.0, 2.0], [1.0])


def test_bootstrap_of_known_numbers() -> None:
    # The exact interval of the median of 101 values: order statistics 41 and 61 (binomial).
    low, high = bootstrap_median([float(value) for value in range(1, 102)], seed=3)
    assert 39 <= low <= 43
    assert 59 <= high <= 63
    assert bootstrap_median([7.0] * 20) == (7.0, 7.0)


def test_bootstrap_repeats_and_moves_with_its_values() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.5, 3.0]
    once = bootstrap_median(values, seed=1)
    assert once == bootstrap_median(values, seed=1)
    moved = bootstrap_median([value + 100 for value in values], seed=1)
    assert moved == pytest.approx([end + 100 for end in once])
    assert once[0] < 3.5 < once[1]


def test_few_values_give_their_range_and_none_is_an_error() -> None:
    assert bootstrap_median([3.0, 1.0, 2.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_median([])


def test_repetitions_stop_at_the_number_asked_for() -> None:
    calls: list[int] = []
    assert len(repeated(lambda: calls.append(1), 4)) == 4
    assert len(calls) == 4
