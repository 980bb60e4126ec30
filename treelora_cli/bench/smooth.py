"""Signatures that form a smooth tree: the nearer two tasks stand in it, the more alike they are.

A leaf of a full binary tree has the sum of one Gaussian offset for each of its ancestors, the
offset at depth h scaled by gamma ** h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from treelora_cli.tree.signatures import SignatureBank

GAMMA = 0.5


def smooth_values(count: int, entries: int, seed: int, gamma: float = GAMMA) -> Tensor:
    """Return the signatures of a smooth tree's leaves in random order, float32 [count, entries].

    Args:
        count: leaves; of a full tree where this is a power of two, else that many of the next.
        entries: entries of a signature.
        seed: of offsets and order.
        gamma: how fast offsets shrink with depth.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = max(1, math.ceil(math.log2(count)))
    values = torch.zeros(2**depth, entries)
    for level in range(1, depth + 1):
        step = 2 ** (depth - level + 1)
        parents = values[::step]
        for side in (values[step // 2 :: step], parents):
            offset = torch.randn(parents.shape, generator=generator)
            torch.add(parents, offset, alpha=gamma**level, out=side)
    return values[torch.randperm(len(values), generator=generator)[:count]]


def bank_of(values: Tensor, blocks: int) -> SignatureBank:
    """Return a bank of synthetic tasks.

    Args:
        values: [N, F].
        blocks: blocks of equal width that F is cut into.
    """
    count, entries = values.shape
    names = tuple(f"synthetic-{number}" for number in range(count))
    return SignatureBank(names, values, (entries // blocks,) * blocks, torch.ones(count, blocks))
