"""An adapter as plain tensors on the host, and what can be said of it without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHTS = "weights."
"""Before a base weight's name in a snapshot."""
PART = "part."
"""Before the name of a method's own parameter in a snapshot."""
Snapshot = dict[str, Tensor]
"""An adapter's tensors by PEFT's saved key, float32 on the host; where more than LoRA is trained,
also base weights after ``weights.`` and a method's own parameters after ``part.``"""


def mean_snapshot(members: Sequence[Snapshot]) -> Snapshot:
    """Return the mean of A and of B over adapters, entry by entry: the same bits whenever asked.

    It is a point that entries can be equal to, not the mean change of the weights, which is no
    mean of factors.
    """
    if len(members) == 1:
        return members[0]
    mean: Snapshot = {}
    for key in members[0]:
        total = torch.zeros(members[0][key].shape, dtype=torch.float64)
        for member in members:
            total += member[key]
        mean[key] = (total / len(members)).float()
    return mean


def rank_of(snapshot: Snapshot) -> int:
    """Return an adapter's rank."""
    return next(value.shape[0] for key, value in snapshot.items() if ".lora_A." in key)


def lora_of(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot's LoRA matrices alone."""
    return {key: value for key, value in snapshot.items() if not is_more(key)}


def is_more(key: str) -> bool:
    """Tell whether a snapshot's key is not of LoRA: a base weight or a method's own parameter."""
    return key.startswith((WEIGHTS, PART))


def concatenated(members: Sequence[Snapshot]) -> Snapshot:
    """Return the one adapter whose change of the weights is the sum of its members' changes.

    Args:
        members: adapters of the same modules and scale, of any ranks; their own parts, if any, are
            the last one's.
    """
    joined = dict(members[-1])
    for key in joined:
        if not is_more(key):
            joined[key] = torch.cat([m[key] for m in members], dim=0 if ".lora_A." in key else 1)
    return joined
