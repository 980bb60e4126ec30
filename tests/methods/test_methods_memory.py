"""Stored rows: what is read back, what is chosen, and how often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from treelora_cli.errors import RunDirError
from treelora_cli.methods._memory import Memory, draw, generator, reservoir, sample_rows
from treelora_cli.models.encode import Example

ROWS = [
    Example((1, 5, 9, 2), 3, False),
    Example((1, 300_000, 2), 1, True),
    Example((7, 2, 8, 2), 2, True, apart=True),
]


def numbered(count: int) -> list[Example]:
    return [Example((1, 10 + number, 2), 1, False) for number in range(count)]


def test_rows_come_back_as_they_were() -> None:
    tensors = Memory(ROWS).tensors()
    assert {key: value.dtype for key, value in tensors.items()} == {
        "rows.tokens": torch.int32,
        "rows.lengths": torch.int32,
        "rows.starts": torch.int32,
        "rows.flags": torch.uint8,
    }
    again = Memory.from_tensors(tensors | {"another": torch.ones(2)}, "a")
    assert again.rows == ROWS
    assert len(again) == 3
    assert Memory.from_tensors(Memory([]).tensors(), "a").rows == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows.tokens", None),
        ("rows.tokens", torch.ones(2, 2)),
        ("rows.tokens", torch.ones(10)),
        ("rows.tokens", -torch.ones(11)),
        ("rows.lengths", torch.tensor([4, 3])),
        ("rows.lengths", torch.tensor([4, 0, 7])),
        ("rows.starts", torch.tensor([4, 1, 2])),
        ("rows.starts", torch.tensor([0, 1, 2])),
        ("rows.flags", torch.zeros(4)),
    ],
)
def test_damaged_rows_are_refused(key: str, value: torch.Tensor | None) -> None:
    tensors = Memory(ROWS).tensors()
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value.to(torch.int32)
    with pytest.raises(RunDirError, match="stored rows of task beta"):
        Memory.from_tensors(tensors, "beta")


def test_a_choice_depends_on_its_seed_alone_and_keeps_the_order() -> None:
    rows = numbered(20)
    chosen = sample_rows(rows, 6, 3)
    assert len(chosen) == 6
    assert chosen == sorted(set(chosen), key=rows.index)
    assert chosen == sample_rows(rows, 6, 3) != sample_rows(rows, 6, 4)
    assert sample_rows(rows, 20, 3) == sample_rows(rows, 99, 3) == rows
    assert (
        torch.rand(2, generator=generator(1, 2)).ne(torch.rand(2, generator=generator(2, 1))).all()
    )


def test_draws_differ_from_step_to_step_and_can_be_repeated() -> None:
    rows = numbered(20)
    steps = [draw(rows, 5, 1, step) for step in range(40)]
    assert steps == [draw(rows, 5, 1, step) for step in range(40)]
    assert len({tuple(found) for found in steps}) > 35
    assert all(len(set(found)) == 5 for found in steps)
    counts = Counter(row for found in steps for row in found)
    assert set(counts) == set(rows)


def test_every_row_is_chosen_equally_often() -> None:
    rows = numbered(8)
    for choose in (
        lambda seed: sample_rows(rows, 2, seed),
        lambda seed: reservoir(reservoir([], 0, rows[:5], 2, seed), 5, rows[5:], 2, seed + 10_000),
    ):
        counts = Counter(row for seed in range(2000) for row in choose(seed))
        # 2000 * 2 / 8 = 500 each, standard deviation about 19.
        assert all(abs(counts[row] - 500) < 80 for row in rows), counts


def test_a_reservoir_fills_up_before_it_drops_anything() -> None:
    rows = numbered(9)
    held = reservoir([], 0, rows[:3], 4, 1)
    assert held == rows[:3]
    held = reservoir(held, 3, rows[3:], 4, 2)
    assert len(held) == len(set(held)) == 4
    assert held == reservoir(rows[:3], 3, rows[3:], 4, 2)
    assert reservoir(rows[:4], 4, [], 4, 9) == rows[:4]
