"""Penalties of B A by rows: value and derivative, whatever the blocks; nothing large is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treelora_cli.methods import _products
from treelora_cli.methods._products import product_penalty


def factors(d_out: int = 7, rank: int = 2, d_in: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return A.requires_grad_(), B.requires_grad_()


def cubes(change: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows that count differently, so that a block in the wrong place shows."""
    weights = torch.arange(1.0, 8.0, dtype=change.dtype)[rows, None]
    return (weights * change**3).sum(), 3 * weights * change**2


@pytest.mark.parametrize("entries", [1, 5, 11, 1000])
def test_value_and_derivative_do_not_depend_on_the_blocks(monkeypatch, entries: int) -> None:
    monkeypatch.setattr(_products, "CPU_ENTRIES", entries)
    A, B = factors()
    found = product_penalty(A, B, cubes)
    expected = (torch.arange(1.0, 8.0, dtype=torch.float64)[:, None] * (B @ A) ** 3).sum()
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda A, B: 0.7 * product_penalty(A, B, cubes), (A, B))


def test_no_block_is_larger_than_allowed_and_nothing_large_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(_products, "CPU_ENTRIES", 64)
    A, B = factors(d_out=40, d_in=30)
    seen: list[tuple[int, int]] = []

    def term(change: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        seen.extend((number, change.shape[1]) for number in range(*rows.indices(40)))
        assert change.numel() <= 64
        return change.square().sum(), 2 * change

    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = product_penalty(A, B, term)
    assert seen == [(number, 30) for number in range(40)]
    assert sum(tensor.numel() for tensor in kept) == A.numel() + B.numel()
    found.backward()
    assert A.grad is not None
    torch.testing.assert_close(A.grad, 2 * B.detach().T @ (B @ A).detach())
