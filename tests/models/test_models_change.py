"""Low-rank algebra against dense matrices: every B A is materialised here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.models.change import distances, mean_change, products

SHAPES = {"x.q": (9, 7), "x.v": (4, 12)}


def adapters(count: int, rank: int, seed: int, size: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        one = {}
        for name, (d_out, d_in) in SHAPES.items():
            one[f"{name}.lora_A.weight"] = size * torch.randn(rank, d_in, generator=generator)
            one[f"{name}.lora_B.weight"] = size * torch.randn(d_out, rank, generator=generator)
        found.append(one)
    return found


def dense(snapshot: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: snapshot[f"{name}.lora_B.weight"].double()
        @ snapshot[f"{name}.lora_A.weight"].double()
        for name in SHAPES
    }


def flat(snapshot: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in dense(snapshot).values()])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_inner_products_are_those_of_the_dense_changes(left, right, rank, seed) -> None:
    one, other = adapters(left, rank, seed), adapters(right, rank, seed + 100)
    expected = torch.stack([torch.stack([flat(a) @ flat(b) for b in other]) for a in one])
    torch.testing.assert_close(products(one, other), expected)


def test_distances_are_frobenius_norms_of_differences() -> None:
    found = adapters(4, 3, 0)
    # The same change by other factors: no distance, though A and B are far apart.
    turned = {key: value * (2.0 if ".lora_A" in key else 0.5) for key, value in found[0].items()}
    found.append(turned)
    away = distances(products(found, found))
    expected = torch.tensor([[float((flat(a) - flat(b)).norm()) for b in found] for a in found])
    torch.testing.assert_close(away, expected.double(), atol=1e-5, rtol=1e-6)
    assert float(away[0, 4]) < 1e-5 * float(flat(found[0]).norm())
    assert bool((away.diagonal() == 0).all())


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_mean_is_the_best_fit_of_its_rank(weights: tuple[float, ...], rank: int) -> None:
    found = adapters(3, rank, 5)
    shares = torch.tensor(weights or (1.0, 1.0, 1.0)).double()
    mean = mean_change(found, weights)
    assert list(mean) == list(found[0])
    assert all(mean[key].shape == found[0][key].shape for key in mean)
    for name, matrix in dense(mean).items():
        target = sum(w * dense(a)[name] for w, a in zip(shares, found, strict=True)) / shares.sum()
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(matrix, best, atol=1e-5, rtol=1e-4)
