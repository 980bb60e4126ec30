"""Differences of adapters: the same bits back, in the fewest bytes of the documented ways."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.models.difference import decode, encode
from treelora_cli.rundir.tensors import load_tensors, save_tensors

# Any finite float32 by its bits: both zeros and denormals among them.
BITS = st.integers(-(2**31), 2**31 - 1).filter(lambda bits: (bits >> 23) & 0xFF != 0xFF)


def from_bits(bits: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).view(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(
        left.view(torch.int32), right.view(torch.int32)
    )


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(BITS, BITS, st.booleans()), min_size=1, max_size=60),
    st.integers(1, 3),
)
def test_any_adapter_comes_back_bit_for_bit(rows, width: int) -> None:
    rows = rows[: len(rows) // width * width] or rows[:1] * width
    shape = (len(rows) // width, width)
    reference = {"a": from_bits([row[0] for row in rows], shape), "b": torch.zeros(3)}
    snapshot = {
        "a": from_bits([row[1] if row[2] else row[0] for row in rows], shape),
        "b": torch.tensor([0.0, -0.0, 1e-45]),
    }
    found = encode(snapshot, reference)
    again = decode(found.tensors, reference)
    assert all(same_bits(again[key], snapshot[key]) for key in snapshot)
    changed = sum(row[2] and row[0] != row[1] for row in rows)
    assert (found.equal, found.entries) == (len(rows) - changed + 1, len(rows) + 3)


def test_negative_zero_is_not_zero() -> None:
    found = encode({"a": torch.tensor([-0.0, 0.0])}, {"a": torch.zeros(2)})
    assert found.equal == 1
    again = decode(found.tensors, {"a": torch.zeros(2)})["a"]
    assert [math.copysign(1, value) for value in again.tolist()] == [-1, 1]


@pytest.mark.parametrize(
    ("changed", "ending"),
    [
        ([], None),
        (range(100_000), ".values"),
        (range(0, 100_000, 2), ".bits"),
        (range(0, 100_000, 50), ".gaps8"),
        ([0, 254, 255, 256, 511, 767, 1023, 1534], ".gaps8"),
        (range(3, 100_000, 9000), ".gaps16"),
        ([70_000, 99_999], ".gaps16"),
    ],
    ids=["none", "all", "half", "fiftieth", "edges", "rare", "beyond-16-bits"],
)
def test_the_smallest_way_is_taken(tmp_path, changed, ending: str | None) -> None:
    places = torch.tensor(list(changed), dtype=torch.int64)
    base = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    value = base.clone()
    value[places] += 1
    found = encode({"a": value}, {"a": base})
    assert set(found.tensors) == ({f"a{end}" for end in {".values", ending}} if ending else set())
    save_tensors(tmp_path / "d.safetensors", found.tensors)
    again = decode(load_tensors(tmp_path / "d.safetensors"), {"a": base})
    assert same_bits(again["a"], value)
    index = found.tensors.get(f"a{ending}")
    if ending not in (None, ".values") and index is not None:
        gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
        sizes = {
            ".bits": 100_000 // 8,
            ".gaps8": len(places) + int((gaps // 255).sum()),
            ".gaps16": 2 * (len(places) + int((gaps // 65535).sum())),
        }
        assert index.numel() * index.element_size() == sizes[ending] == min(sizes.values())


@pytest.mark.parametrize(
    "damaged",
    [
        {"a.values": torch.zeros(3), "a.gaps8": torch.tensor([3, 66], dtype=torch.uint8)},
        {"a.values": torch.zeros(2).double(), "a.gaps8": torch.tensor([3, 6], dtype=torch.uint8)},
        {"a.values": torch.zeros(2), "a.bits": torch.zeros(9, dtype=torch.uint8)},
        {"a.values": torch.zeros(2), "a.gaps8": torch.tensor([3, 77], dtype=torch.uint8)},
        {"a.values": torch.zeros(2), "a.gaps8": torch.tensor([3, 66], dtype=torch.int32)},
        {
            "a.values": torch.zeros(2),
            "a.gaps8": torch.tensor([3, 66], dtype=torch.uint8),
            "a.bits": torch.zeros(10, dtype=torch.uint8),
        },
        {"a.values": torch.zeros(79)},
        {"z.values": torch.zeros(1)},
    ],
    ids=["count", "dtype", "size", "beyond", "kind", "two", "short", "stranger"],
)
def test_what_is_no_difference_is_refused(damaged: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'[az]"):
        decode(damaged, {"a": torch.zeros(80)})
