"""Low-rank algebra of what adapters change: norms, distances and means of B A, from the factors.

The change of a module's weights is s B A, with s = alpha / rank. Different factors can make the
same change, so adapters are compared and averaged by what they change; the mean of the factors A
and of the factors B apart would be the change of no adapter at all. No [d_out, d_in] matrix is
ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from treelora_cli.models.snapshot import Snapshot

A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"


def _factor_keys(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for key in snapshot:
        if key.endswith(A_KEY):
            yield key, key.removesuffix(A_KEY) + B_KEY


def products(left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Tensor:
    """Return the inner products of changes, without the scale s, summed over the modules.

    <B_l A_l, B_r A_r> = sum over entries of (B_l' B_r) * (A_l A_r'), so a pair costs O(d r^2).

    Args:
        left: L adapters of the same shapes.
        right: R adapters of those shapes.

    Returns:
        float64 [L, R]; exact but for the rounding of float64.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for down, up in _factor_keys(left[0]):
        rank = left[0][down].shape[0]
        ups = _side_by_side(left, up).T @ _side_by_side(right, up)
        downs = _stacked(left, down) @ _stacked(right, down).T
        total += (ups * downs).view(len(left), rank, len(right), rank).sum((1, 3))
    return total


def _side_by_side(snapshots: Sequence[Snapshot], up: str) -> Tensor:
    return torch.cat([snapshot[up] for snapshot in snapshots], dim=1).double()


def _stacked(snapshots: Sequence[Snapshot], down: str) -> Tensor:
    return torch.cat([snapshot[down] for snapshot in snapshots]).double()


def distances(gram: Tensor) -> Tensor:
    """Return Frobenius distances from inner products.

    Args:
        gram: [N, N], see :func:`products`.

    Returns:
        float64 [N, N] in the unit of the norms; differences below 1e-8 of a norm are rounding.
    """
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0).sqrt()


def mean_change(snapshots: Sequence[Snapshot], weights: Sequence[float] = ()) -> Snapshot:
    """Return the adapter nearest to the mean weight change of several adapters.

    For every module the mean of B_i A_i is cut to the adapters' rank by a singular value
    decomposition, taken of the concatenated factors.

    Args:
        snapshots: adapters of the same shapes, at least one, keyed as PEFT saves them.
        weights: how much each counts, positive; nothing: all the same.

    Returns:
        An adapter of those shapes whose factors share the singular values evenly.
    """
    counts = list(weights) or [1.0] * len(snapshots)
    mean: Snapshot = {}
    for down, up in _factor_keys(snapshots[0]):
        ups = [snapshot[up].double() * n for snapshot, n in zip(snapshots, counts, strict=True)]
        downs = [snapshot[down] for snapshot in snapshots]
        mean[down], mean[up] = _cut(downs, torch.cat(ups, dim=1) / sum(counts))
    return {key: mean[key] for key in snapshots[0]}


def _cut(downs: list[Tensor], ups: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [r, d_in] and B [d_out, r] with B A the best rank-r fit to sum(B_i A_i)."""
    rank = downs[0].shape[0]
    left, upper = torch.linalg.qr(ups)
    right, lower = torch.linalg.qr(torch.cat(downs).double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:rank].sqrt()
    B = (left @ u[:, :rank]) * root
    A = root[:, None] * (vh[:rank] @ right.T)
    # The signs of singular vectors are free; fixing them makes the mean a function of its inputs.
    peaks = A.gather(1, A.abs().argmax(1, keepdim=True)).squeeze(1)
    signs = torch.where(peaks < 0, -1.0, 1.0).double()
    return _padded(A * signs[:, None], rank, 0), _padded(B * signs, rank, 1)


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Fill up with zeros where a module is narrower than the adapter's rank."""
    missing = rank - matrix.shape[dim]
    if missing > 0:
        shape = list(matrix.shape)
        shape[dim] = missing
        matrix = torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
    return matrix.float().contiguous()
