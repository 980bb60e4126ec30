"""Distances, scales and xi against plain loops; refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import DivergedError
from treelora_cli.tree.signatures import SignatureBank, block_means

widths_lists = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def random_bank(n: int, widths: list[int], seed: int) -> tuple[SignatureBank, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    bank = SignatureBank.empty(widths)
    for i in range(n):
        bank = bank.add(
            f"T{i}",
            torch.randn(sum(widths), generator=rng),
            torch.rand(len(widths), generator=rng),
        )
    return bank, torch.randn(sum(widths), generator=rng)


def blocks_of(row: list[float], widths: list[int]) -> list[list[float]]:
    out, start = [], 0
    for width in widths:
        out.append(row[start : start + width])
        start += width
    return out


def loop_distance(a: list[float], b: list[float], widths: list[int]) -> list[float]:
    return [
        sum(abs(x - y) for x, y in zip(u, v, strict=True)) / len(u)
        for u, v in zip(blocks_of(a, widths), blocks_of(b, widths), strict=True)
    ]


def loop_scales(rows: list[list[float]], widths: list[int]) -> list[float]:
    if len(rows) < 2:
        return [1.0] * len(widths)
    centre = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    parts = [loop_distance(row, centre, widths) for row in rows]
    return [sum(column) / len(rows) for column in zip(*parts, strict=True)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6), widths=widths_lists, seed=st.integers(0, 10**6))
def test_xi_and_scales_equal_plain_loops(n: int, widths: list[int], seed: int) -> None:
    bank, query = random_bank(n, widths, seed)
    rows, q = bank.values.tolist(), query.tolist()
    scales = loop_scales(rows, widths)
    assert bank.scales().tolist() == pytest.approx(scales, rel=1e-4)
    expected = [
        sum(d / c for d, c in zip(loop_distance(q, row, widths), scales, strict=True)) / len(widths)
        for row in rows
    ]
    assert bank.xi_all(query, bank.scales()).tolist() == pytest.approx(expected, rel=1e-4)
    for arm in range(n):
        assert float(bank.xi(query, arm, bank.scales())) == pytest.approx(expected[arm], rel=1e-4)
    distances = bank.block_distances(query, [n - 1, 0])
    assert distances[0].tolist() == pytest.approx(loop_distance(q, rows[-1], widths), rel=1e-4)
    assert distances[1].tolist() == pytest.approx(loop_distance(q, rows[0], widths), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 5), widths=widths_lists, seed=st.integers(0, 10**6))
def test_block_scope_pull_takes_each_blocks_own_arm(n: int, widths: list[int], seed: int) -> None:
    bank, query = random_bank(n, widths, seed)
    scales = bank.scales()
    arms = [(seed + d) % n for d in range(len(widths))]
    table = bank.scaled_distances(query, scales)
    expected = [float(table[arm, d]) for d, arm in enumerate(arms)]
    if len(widths) > 1:
        assert bank.pull(query, arms, scales).tolist() == pytest.approx(expected, rel=1e-5)
    one = bank.pull(query, [arms[0]], scales)
    assert one.shape == (1,)
    assert float(one) == pytest.approx(float(table[arms[0]].mean()), rel=1e-5)


def test_block_means_of_equal_and_unequal_widths_agree() -> None:
    entries = torch.randn(4, 24)
    split = block_means(entries, (8, 8, 8))
    assert torch.allclose(split, entries.view(4, 3, 8).mean(2), atol=1e-6)
    uneven = block_means(entries, (12, 4, 8))
    assert torch.allclose(uneven[:, 0], entries[:, :12].mean(1), atol=1e-6)
    assert torch.allclose(uneven[:, 1], entries[:, 12:16].mean(1), atol=1e-6)
    coprime = block_means(entries, (17, 7))
    assert torch.allclose(coprime[:, 1], entries[:, 17:].mean(1), atol=1e-6)


def test_a_wide_block_weighs_no_more_than_a_narrow_one() -> None:
    bank = SignatureBank.empty((2, 1000)).add("a", torch.zeros(1002), torch.ones(2))
    narrow, wide = torch.zeros(1002), torch.zeros(1002)
    narrow[:2] = 1
    wide[2:] = 1
    ones = torch.ones(2)
    assert float(bank.xi(narrow, 0, ones)) == pytest.approx(float(bank.xi(wide, 0, ones)))


def test_chunked_and_whole_distances_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, query = random_bank(7, [3, 5], 3)
    whole, mean = bank.block_distances(query), bank.mean([0, 2, 5])
    monkeypatch.setattr("treelora_cli.tree.signatures._CHUNK_ENTRIES", 16)
    monkeypatch.setattr("treelora_cli.tree.signatures._COMPARED_ENTRIES", 16)
    assert torch.equal(bank.block_distances(query), whole)
    assert torch.allclose(bank.mean([0, 2, 5]), mean)


def test_scales_are_one_where_undefined_or_rounding() -> None:
    bank = SignatureBank.empty((4, 4))
    assert bank.scales().tolist() == [1, 1]
    assert bank.displacement_scale().tolist() == [0, 0]
    row = torch.full((8,), 1 / 3)
    one = bank.add("a", row, torch.ones(2))
    assert one.scales().tolist() == [1, 1]
    nudged = row.clone()
    nudged[:4] = torch.nextafter(row[:4], torch.ones(4))
    nudged[4:] += 0.1
    two = one.add("b", nudged, 3 * torch.ones(2))
    assert two.scales()[0] == 1
    assert float(two.scales()[1]) == pytest.approx(0.05, rel=1e-4)
    assert two.displacement_scale().tolist() == [2, 2]


def test_add_leaves_the_old_bank_and_the_callers_tensor_alone() -> None:
    bank, row = SignatureBank.empty((3,)), torch.ones(3, dtype=torch.bfloat16)
    grown = bank.add("a", row, torch.ones(1))
    row.zero_()
    assert len(bank) == 0
    assert grown.values.tolist() == [[1, 1, 1]]
    assert grown.values.dtype == torch.float32


def test_xi_carries_no_graph() -> None:
    bank, query = random_bank(2, [3], 0)
    assert not bank.xi(query.requires_grad_(), 0, bank.scales()).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    bank, query = random_bank(3, [2, 3], 0)
    scales = bank.scales()
    query[3] = bad
    for call in (
        lambda: bank.xi_all(query, scales),
        lambda: bank.add("new", query, torch.ones(2)),
        lambda: bank.add("new", torch.zeros(5), torch.tensor([1.0, bad])),
    ):
        with pytest.raises(DivergedError):
            call()
    # A step does not ask; the search that gets the feedback does.
    for arms in ([1], [0, 1]):
        assert not torch.isfinite(bank.pull(query, arms, scales)).all()
    huge = SignatureBank.empty((1,))
    for i in range(2):
        huge = huge.add(f"h{i}", torch.tensor([3e38]), torch.ones(1))
    with pytest.raises(DivergedError):
        huge.scales()


def test_shapes_and_names_are_checked() -> None:
    bank, query = random_bank(2, [2, 3], 0)
    for call in (
        lambda: bank.add("T0", query, torch.ones(2)),
        lambda: bank.add("new", query[:4], torch.ones(2)),
        lambda: bank.add("new", query, torch.ones(3)),
        lambda: bank.xi(query[:4], 0, bank.scales()),
        lambda: SignatureBank.empty([]),
        lambda: SignatureBank(("a",), torch.zeros(1, 2, dtype=torch.float64), (2,), torch.ones(1)),
    ):
        with pytest.raises(ValueError):
            call()
