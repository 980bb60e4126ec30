"""Every number of the evidence against the same number from dense matrices, entry by entry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.models.evidence import Adapter, Change, Evidence, added, evidence

# Wide, tall (as a grouped-query projection is the other way round), and narrower than a sum's rank.
SHAPES = {"q_proj": (24, 16), "k_proj": (6, 16), "up_proj": (40, 24), "tiny": (3, 5)}


def adapter(rank: int, seed: int, scale: float = 0.5) -> Adapter:
    """Random factors of every module."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (height, width) in SHAPES.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(height, rank, generator=draw)
    return Adapter(tensors, scale)


def grown(before: Adapter, more: Adapter) -> Adapter:
    """The sum of two adapters' changes, rank-concatenated, the earlier one's rows first."""
    joined = {
        key: torch.cat([value, more.tensors[key]], dim=0 if ".lora_A." in key else 1)
        for key, value in before.tensors.items()
    }
    return Adapter(joined, before.scale)


def dense(one: Adapter) -> list[torch.Tensor]:
    """s B A of every module."""
    names = [key.removesuffix(".lora_A.weight") for key in one.tensors if ".lora_A." in key]
    return [
        one.scale
        * one.tensors[f"{name}.lora_B.weight"].double()
        @ one.tensors[f"{name}.lora_A.weight"].double()
        for name in names
    ]


def minus(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    return [a - b for a, b in zip(left, right, strict=True)]


def one_module(*matrices: torch.Tensor) -> list[Change]:
    """Changes of a single module, given as matrices."""
    found = []
    for matrix in matrices:
        factors = {"m.lora_A.weight": torch.eye(matrix.shape[1]), "m.lora_B.weight": matrix}
        found.append(added(Adapter(factors, 1.0)))
    return found


def same(found: torch.Tensor, wanted: torch.Tensor | float) -> bool:
    return float(found) == pytest.approx(float(wanted), rel=1e-9, abs=1e-12)


def check(found: Evidence, changes: list[list[torch.Tensor]], threshold: float = 0.1) -> None:
    """Compare with the definitions, written out over dense matrices."""
    flat = [torch.cat([module.flatten() for module in change]) for change in changes]
    assert found.entries == len(flat[0])
    counted = [entries.abs() > threshold * entries.square().mean().sqrt() for entries in flat]
    for i, change in enumerate(changes):
        assert same(found.norm[i], flat[i].norm())
        values = [torch.linalg.matrix_norm(module, "nuc") for module in change]
        assert same(found.nuclear[i], sum(values))
        assert same(found.density[i], counted[i].double().mean())
    for i, j in itertools.product(range(len(changes)), repeat=2):
        assert same(found.collision[i, j], (counted[i] & counted[j]).double().mean())
        cosine = flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm())
        assert same(found.cosine[i, j], cosine)

        def shared(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
            return sum(float((u @ v.T).square().sum()) for u, v in zip(a, b, strict=True))

        self_i, self_j = shared(changes[i], changes[i]), shared(changes[j], changes[j])
        overlap = shared(changes[i], changes[j]) / math.sqrt(self_i * self_j)
        assert same(found.overlap[i, j], overlap)


def test_own_adapters_of_any_rank() -> None:
    tasks = [adapter(4, 0), adapter(2, 1, scale=3.0), adapter(1, 2)]
    check(evidence([added(task) for task in tasks]), [dense(task) for task in tasks])


def test_one_adapter_that_goes_on() -> None:
    after = [adapter(4, seed) for seed in range(3)]
    changes = [added(after[0]), added(after[1], after[0]), added(after[2], after[1])]
    whole = [dense(task) for task in after]
    check(evidence(changes), [whole[0], minus(whole[1], whole[0]), minus(whole[2], whole[1])])


def test_ranks_and_scales_may_differ_between_the_two() -> None:
    before, after = adapter(2, 5, scale=4.0), adapter(3, 6, scale=0.25)
    changes = [added(after, before), added(before)]
    check(evidence(changes), [minus(dense(after), dense(before)), dense(before)])


def test_of_a_sum_of_adapters_the_last_one_is_what_was_added() -> None:
    parts = [adapter(2, seed) for seed in range(4)]
    sums = list(itertools.accumulate(parts, grown))
    changes = [added(sums[0]), *(added(b, a) for a, b in itertools.pairwise(sums))]
    for change, part in zip(changes, parts, strict=True):
        for name, (height, width) in SHAPES.items():
            assert len(change[name].values) == min(2, height, width)
            assert torch.equal(change[name].values, added(part)[name].values)
    check(evidence(changes), [dense(part) for part in parts])


def test_a_sum_under_another_scale_is_not_taken_for_one() -> None:
    before = adapter(2, 0, scale=2.0)
    after = Adapter(grown(before, adapter(2, 1)).tensors, 1.0)
    change = added(after, before)
    check(evidence([change]), [minus(dense(after), dense(before))])


def test_an_adapter_that_stays_changes_nothing() -> None:
    one, two = adapter(3, 0), adapter(3, 1)
    again = Adapter({key: value.clone() for key, value in one.tensors.items()}, one.scale)
    found = evidence([added(one), added(again, one), added(two, one)])
    assert [float(found.norm[1]), float(found.nuclear[1]), float(found.density[1])] == [0, 0, 0]
    assert found.collision[1].tolist() == [0, 0, 0]
    for pairs in (found.cosine, found.overlap):
        assert pairs[1].isnan().all()
        assert not pairs[0, [0, 2]].isnan().any()


def test_what_rounding_leaves_of_equal_changes_is_no_change() -> None:
    one = adapter(3, 0)
    mixed = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    other = {}
    for key, value in one.tensors.items():
        turned = mixed @ value.double() if ".lora_A." in key else value.double() @ mixed.T
        other[key] = turned
    change = added(Adapter(other, one.scale), one)
    assert all(len(part.values) == 0 for part in change.values())


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1, 5000))
def test_the_chunk_changes_no_number(chunk: int) -> None:
    tasks = [adapter(3, seed) for seed in range(3)]
    changes = [added(task) for task in tasks]
    check(evidence(changes, chunk=chunk), [dense(task) for task in tasks])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_the_threshold_is_in_root_mean_squares_of_the_task(threshold: float) -> None:
    tasks = [adapter(3, seed, scale=10.0**seed) for seed in range(3)]
    found = evidence([added(task) for task in tasks], threshold)
    check(found, [dense(task) for task in tasks], threshold)
    if not threshold:
        assert found.density.tolist() == [1, 1, 1]


def test_entries_below_the_threshold_hold_less_than_its_square_of_the_norm() -> None:
    matrix = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) ** 5
    found = evidence(one_module(matrix), 0.5)
    flat = matrix.double().flatten().abs().sort().values
    left = flat[: round((1 - float(found.density[0])) * flat.numel())]
    assert 0 < float(left.square().sum()) < 0.25 * float(flat.square().sum())


def test_changes_of_other_entries_do_not_collide() -> None:
    left, right = torch.zeros(6, 8), torch.zeros(6, 8)
    left[:3], right[3:] = 1.0, torch.randn(3, 8)
    found = evidence(one_module(left, right))
    assert float(found.density[0]) == 0.5
    assert float(found.collision[0, 1]) == 0
    assert float(found.cosine[0, 1]) == pytest.approx(0, abs=1e-15)


def test_the_same_change_collides_wherever_it_is() -> None:
    one = adapter(3, 0)
    double = Adapter(one.tensors, 2 * one.scale)
    found = evidence([added(one), added(double)])
    assert float(found.collision[0, 1]) == float(found.density[0]) == float(found.density[1])
    assert float(found.cosine[0, 1]) == pytest.approx(1)
    assert float(found.overlap[0, 1]) == pytest.approx(1)
    assert float(found.norm[1]) == pytest.approx(2 * float(found.norm[0]))
    opposite = added(Adapter(one.tensors, -one.scale))
    found = evidence([added(one), opposite])
    assert float(found.cosine[0, 1]) == pytest.approx(-1)
    assert float(found.overlap[0, 1]) == pytest.approx(1)


def test_orthogonal_changes_may_collide_everywhere() -> None:
    left = torch.ones(4, 4)
    right = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(4, 1)
    found = evidence(one_module(left, right))
    assert float(found.collision[0, 1]) == 1
    assert float(found.cosine[0, 1]) == pytest.approx(0, abs=1e-15)
    # Rows of ones and of alternating signs read different inputs, too.
    assert float(found.overlap[0, 1]) == pytest.approx(0, abs=1e-15)
    # The same inputs written elsewhere: orthogonal, and yet they overlap.
    found = evidence(one_module(left, right.T))
    assert float(found.cosine[0, 1]) == pytest.approx(0, abs=1e-15)
    assert float(found.overlap[0, 1]) == pytest.approx(1)


def test_progress_counts_modules() -> None:
    told: list[tuple[int, int]] = []
    evidence([added(adapter(2, 0))], progress=lambda done, of: told.append((done, of)))
    assert told == [(n, len(SHAPES)) for n in range(1, len(SHAPES) + 1)]
