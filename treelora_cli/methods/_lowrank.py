"""Adam in a low-rank space of a weight matrix's gradients, and bases of what tasks have used.

Sources: GaLore (Zhao et al., ICML 2024, Algorithm 1) for the low-rank Adam; GORP (Wang et al., ACL
2025, arXiv 2507.02503) for its second side and for bases taken from first moments; GPM (Saha et
al., ICLR 2021, Eq. 9) for how many directions of a task a basis takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Sides = Literal["both", "one"]

# Adam's epsilon, relative to the largest entry: where U and V have just been chosen, U' G V is
# diagonal but for rounding, which an absolute epsilon would blow up to steps of full size.
_EPS = 1e-4
_TINY = torch.finfo(torch.float32).tiny
# Directions beyond the rank that the randomised SVD looks at: with two power iterations the wanted
# ones are then as good as exact wherever the spectrum falls at all.
_OVERSAMPLED = 8


@dataclass(frozen=True)
class LowRank:
    """How a weight is trained in a low-rank space.

    Attributes:
        rank: directions k kept of each side of the gradient.
        gap: steps after which they are chosen anew.
        sides: ``both``: U' G V, [k, k]; ``one``: the shorter side's, U' G or G V.
        betas: Adam's.
    """

    rank: int
    gap: int
    sides: Sides
    betas: tuple[float, float]


class ProjectedAdam:
    """Trains one weight matrix W [d_out, d_in] in the leading directions of its gradient G.

    With S the orthonormal basis of inputs that earlier tasks have used, G' = G - G S S'; every
    ``gap`` steps U and V become its leading singular vectors; Adam's moments are those of U' G' V;
    and W <- W - lr U (m / sqrt(v)) V', off S once more. As in GaLore the moments are kept where U
    and V change.

    Args:
        weight: W, float32; it is changed in place.
        past: S, float32 [d_in, q], q may be 0, on the weight's device.
        how: see there.
    """

    def __init__(self, weight: torch.nn.Parameter, past: Tensor, how: LowRank) -> None:
        rows, columns = weight.shape
        self._weight = weight
        self._past = past
        self._how = how
        self._rank = min(how.rank, rows, columns)
        # Of one side alone the shorter one is cut, and what is kept is as wide as the other.
        self._cut_left = how.sides == "both" or rows < columns
        self._cut_right = how.sides == "both" or rows >= columns
        height = self._rank if self._cut_left else rows
        width = self._rank if self._cut_right else columns
        device = weight.device
        self._left = torch.zeros(rows, self._rank, device=device)
        self._right = torch.zeros(columns, self._rank, device=device)
        self._first = torch.zeros(height, width, device=device)
        self._second = torch.zeros(height, width, device=device)
        self._steps = 0

    def see(self, gradient: Tensor, seed: int) -> Tensor:
        """Take a step's gradient into the moments.

        Args:
            gradient: G, float32 [d_out, d_in].
            seed: of the randomised SVD, where one is due.

        Returns:
            The squared norm of what was taken off it, a float32 scalar on the device.
        """
        away = gradient @ self._past
        gradient = gradient - away @ self._past.T
        if self._steps % self._how.gap == 0:
            self._aim(gradient, seed)
        if self._cut_left:
            gradient = self._left.T @ gradient
        if self._cut_right:
            gradient = gradient @ self._right
        first, second = self._how.betas
        self._first.lerp_(gradient, 1 - first)
        self._second.lerp_(gradient.square(), 1 - second)
        self._steps += 1
        return away.square().sum()

    def _aim(self, gradient: Tensor, seed: int) -> None:
        wanted = min(self._rank + _OVERSAMPLED, *gradient.shape)
        devices = [gradient.device] if gradient.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            left, _, right = torch.svd_lowrank(gradient, q=wanted)
        # Contiguous, as they are read back from a checkpoint: products then have the same bits.
        self._left = left[:, : self._rank].contiguous()
        self._right = right[:, : self._rank].contiguous()

    def step(self, lr: float) -> None:
        """Change the weight by what has been seen."""
        first, second = self._how.betas
        moment = self._first / (1 - first**self._steps)
        scale = (self._second / (1 - second**self._steps)).sqrt()
        change = moment / (scale + _EPS * scale.amax()).clamp_min(_TINY)
        if self._cut_left:
            change = self._left @ change
        if self._cut_right:
            change = change @ self._right.T
        change = change - (change @ self._past) @ self._past.T
        with torch.no_grad():
            self._weight.sub_(change, alpha=lr)

    def moment(self) -> Tensor:
        """Return a matrix [n, d_in] with the right singular pairs of the lifted first moment."""
        # U on the left would change neither singular values nor right singular vectors.
        return self._first @ self._right.T if self._cut_right else self._first

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the weight, on the host."""
        named = {
            "left": self._left,
            "right": self._right,
            "first": self._first,
            "second": self._second,
            "steps": torch.tensor(self._steps),
        }
        return {key: value.cpu().clone() for key, value in named.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up a checkpoint; the weight itself has been put back already."""
        device = self._weight.device
        self._left = tensors["left"].to(device)
        self._right = tensors["right"].to(device)
        self._first = tensors["first"].to(device)
        self._second = tensors["second"].to(device)
        self._steps = int(tensors["steps"])


class Bases:
    """Orthonormal bases that grow from task to task, by key; float32 [d, q] on a device.

    Args:
        widths: d by key.
        device: where they live.
    """

    def __init__(self, widths: dict[str, int], device: torch.device) -> None:
        self._bases = {key: torch.zeros(width, 0, device=device) for key, width in widths.items()}

    def __getitem__(self, key: str) -> Tensor:
        """Return a basis, [d, q]."""
        return self._bases[key]

    def add(self, columns: dict[str, Tensor]) -> None:
        """Add orthonormal columns [d, j] to bases that they are orthogonal to."""
        for key, value in columns.items():
            basis = self._bases[key]
            self._bases[key] = torch.cat([basis, value.to(basis.device, basis.dtype)], dim=1)

    def full(self) -> list[str]:
        """Return the keys of bases that leave no direction free."""
        return [key for key, basis in self._bases.items() if basis.shape[1] == basis.shape[0]]

    def share(self, keys: Sequence[str]) -> float:
        """Return which part of the directions the bases of these keys hold, on average."""
        shares = [self._bases[key].shape[1] / self._bases[key].shape[0] for key in keys]
        return sum(shares) / len(shares)


def added(moment: Tensor, past: Tensor, energy: float) -> Tensor:
    """Return the directions that a basis has to be given for a task.

    The right singular vectors of the moment off the basis, as few as bring the part of the
    moment's squared norm that lies in the basis to ``energy``.

    Args:
        moment: [n, d]; all zero: nothing is added.
        past: the basis so far, [d, q].
        energy: between 0 and 1.

    Returns:
        Orthonormal columns, orthogonal to the basis, float32 [d, j] on the host.
    """
    M, S = moment.double().cpu(), past.double().cpu()
    within = M @ S
    free = M - within @ S.T
    _, values, vectors = torch.linalg.svd(free, full_matrices=False)
    squares = values.square()
    missing = energy * M.square().sum() - within.square().sum()
    # Every direction is taken before which something was missing.
    count = int((squares.cumsum(0) - squares < missing).sum())
    count = min(count, S.shape[0] - S.shape[1])
    # A small singular value lets rounding turn its vector a little into the basis.
    rows = vectors[:count] - (vectors[:count] @ S) @ S.T
    columns: Tensor = torch.linalg.qr(rows.T).Q
    return columns.float().contiguous()
