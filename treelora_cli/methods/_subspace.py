"""Which directions of a module's inputs earlier tasks have used: the memory of InfLoRA (DualGPM).

Source: DualGPM (Liang & Li: Adaptive Plasticity Improvement for Continual Learning, CVPR 2023),
built on GPM (Saha et al., ICLR 2021). With C = sum of x x' over a task's inputs x, and F an
orthonormal basis of what no task has used yet, the eigenvectors of F' C F with the largest
eigenvalues become used, as few as make the energy of the inputs in the used space reach a
threshold: tr C - tr F' C F + l_1 + ... + l_k >= threshold tr C. "Dual": the used space is stored
while it is the smaller one, afterwards the free one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Below this share of the whole energy a direction is what rounding left of none.
_NOTHING = 1e-10


class Split(NamedTuple):
    """An orthonormal basis of all inputs, cut in two; float64 [d, m] and [d, d - m]."""

    used: Tensor
    free: Tensor


@dataclass(frozen=True)
class InputSpace:
    """The inputs of a module that earlier tasks have used, or those that none has.

    Attributes:
        basis: orthonormal columns, float32 [d, at most about d / 2].
        is_free: whether the basis is of the free space.
    """

    basis: Tensor
    is_free: bool = False

    @classmethod
    def unused(cls, width: int) -> InputSpace:
        """Return the space of a module of that many inputs before any task."""
        return cls(torch.zeros(width, 0))

    @property
    def share(self) -> float:
        """The share of the input's directions that is used."""
        width, columns = self.basis.shape
        return (width - columns if self.is_free else columns) / width

    def split(self, device: torch.device) -> Split:
        """Return bases of both parts on a device; the stored one is made orthonormal again."""
        columns = self.basis.shape[1]
        whole = torch.linalg.qr(self.basis.to(device, torch.float64), mode="complete").Q
        mine, other = whole[:, :columns], whole[:, columns:]
        return Split(other, mine) if self.is_free else Split(mine, other)


def energy_used(space: InputSpace, covariance: Tensor) -> Tensor:
    """Return how much of inputs' energy lies in the used space, as a share of 1; a scalar.

    Args:
        space: of the module.
        covariance: [d, d], the sum of x x' over its inputs.
    """
    C = covariance.double()
    used = space.split(C.device).used
    return (used * (C @ used)).sum() / C.trace().clamp_min(torch.finfo(C.dtype).tiny)


def design(space: InputSpace, covariance: Tensor, rank: int) -> Tensor:
    """Return the down-projection that reads the free inputs with the largest energy.

    Its rows are the eigenvectors of the covariance within the free space, divided by sqrt(3):
    then they are as long as those of the usual start, which draws from U(-1, 1) / sqrt(d).

    Args:
        space: what earlier tasks have used.
        covariance: [d, d], the sum of x x' over the new task's inputs.
        rank: of the adapter.

    Returns:
        float32 [rank, d]; rows are zero where fewer directions are left with any energy.
    """
    C = covariance.double()
    free = space.split(C.device).free
    values, vectors = _directions(free, C)
    rows = torch.zeros(rank, len(C), dtype=torch.float64, device=C.device)
    found = (free @ vectors[:, :rank]).T
    alive = values[:rank, None] > _NOTHING * C.trace()
    rows[: len(found)] = found * alive / math.sqrt(3)
    return rows.float()


def with_inputs(space: InputSpace, covariance: Tensor, threshold: float) -> InputSpace:
    """Return a space in which a finished task's inputs are used too.

    Args:
        space: what earlier tasks have used.
        covariance: [d, d], the sum of x x' over the task's inputs; all zero: nothing is added.
        threshold: the share of the inputs' energy that has to lie in the used space.
    """
    C = covariance.double()
    used, free = space.split(C.device)
    values, vectors = _directions(free, C)
    missing = threshold * C.trace() - (C.trace() - values.sum())
    # Every eigenvector is taken before which something was missing.
    before = values.cumsum(0) - values
    count = int((before < missing - _NOTHING * C.trace()).sum())
    used = torch.cat([used, free @ vectors[:, :count]], dim=1)
    free = free @ vectors[:, count:]
    is_free = used.shape[1] > free.shape[1]
    return InputSpace((free if is_free else used).float().cpu(), is_free)


def _directions(free: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [p], largest first, and eigenvectors [p, p] of F' C F."""
    within = free.T @ covariance @ free
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)
