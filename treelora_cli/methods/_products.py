"""Penalties of what an adapter changes, B A, entry by entry, without keeping a dense matrix.

B A is as large as the weight it changes. Its rows are made some at a time; each part's derivative
is taken at once, so that what stays for the backward pass is of the factors' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ENTRIES = 1 << 16
"""Entries of B A at a time on a CPU: 256 KiB in float32, which its cache holds."""
MOST_ENTRIES = 1 << 24
"""Entries at a time elsewhere: 64 MiB; an accelerator needs few and large operations."""

Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Given rows of B A and which ones these are, returns what they count, a scalar, and its derivative
by them."""


def product_penalty(A: Tensor, B: Tensor, term: Term) -> Tensor:
    """Return the sum of a term over the rows of B A, differentiable by A and B.

    Args:
        A: [r, d_in].
        B: [d_out, r].
        term: evaluated outside the graph.

    Returns:
        A scalar in the graph of A and B.
    """
    found: Tensor = _OfProduct.apply(A, B, term)  # type: ignore[no-untyped-call]
    return found


class _OfProduct(torch.autograd.Function):
    """The sum of a term over the rows of B A, with its gradient made on the way."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, term: Term) -> Tensor:
        total, by_A, by_B = A.new_zeros(()), torch.zeros_like(A), torch.empty_like(B)
        entries = CPU_ENTRIES if A.device.type == "cpu" else MOST_ENTRIES
        count = max(1, entries // A.shape[1])
        for first in range(0, B.shape[0], count):
            rows = slice(first, first + count)
            value, slope = term(B[rows] @ A, rows)
            total += value
            by_A += B[rows].T @ slope
            by_B[rows] = slope @ A.T
        ctx.save_for_backward(by_A, by_B)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        by_A, by_B = ctx.saved_tensors
        return upstream[0] * by_A, upstream[0] * by_B, None
