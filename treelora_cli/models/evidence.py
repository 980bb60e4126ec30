"""How the weight changes of several tasks meet: collision, orthogonality and nuclear norm.

Source: the evidence of N-LoRA (Yang et al., COLING 2025, arXiv 2410.10179): tasks disturb each
other where both change the same entries (collision) and where their changes are not orthogonal;
sparse changes of small nuclear norm do neither. What is computed of the change W_t that a task t
made, over all adapted modules together:

- nuclear norm: the sum of the singular values of W_t;
- density: the share of its entries that count as changed. The paper counts those that are not 0,
  but an L1 penalty's subgradient leaves none at exactly 0. Here an entry counts where its absolute
  value is above ``threshold`` times the root mean square of W_t's entries: those left out hold
  together less than threshold^2 of |W_t|^2, 1 % by default, whatever the scale (a change that is
  only smaller shows in the norms). Entries drawn from a normal distribution have density 0.92. A
  threshold of 0 is the paper's;
- collision of i and j: the share of entries that count in both. Were the places independent, it
  would be the product of the densities;
- cosine: <W_i, W_j> / (|W_i| |W_j|), Frobenius: 0 where the changes are orthogonal as vectors;
- overlap: |W_i W_j'|^2 / (|W_i W_i'| |W_j W_j'|), the prime for the transpose: 0 where no input is
  read by both (what O-LoRA's A_i A_j' = 0 demands), 1 where both read the same inputs with the
  same strengths. Unlike A_i A_j' it does not depend on how a change is split into factors.

All but density and collision come from the factors alone. Those two need the entries, which are
made a few rows of one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from treelora_cli.models.change import A_KEY, B_KEY
from treelora_cli.models.snapshot import Snapshot

THRESHOLD = 0.1
"""The entries left out hold less than 1 % of the squared norm."""

CHUNK = 1 << 22
"""Entries, over all tasks, that are compared at a time: some 50 MiB, with what they are made of."""

# Singular values below this share of |B| |A| are what rounding leaves of an exact cancellation.
_ROUNDING = 1e-12


class Adapter(NamedTuple):
    """A stored adapter with its scale s = alpha / rank: it changes a module by s B A."""

    tensors: Snapshot
    scale: float


class Part(NamedTuple):
    """A module's change as its singular value decomposition, float64.

    Attributes:
        left: [d_out, k], orthonormal columns.
        values: [k], positive, descending; k = 0 where nothing changed.
        right: [k, d_in], orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


Change = dict[str, Part]
"""What a task changed, by module as PEFT's saved keys name it."""


@dataclass(frozen=True)
class Evidence:
    """The numbers of T tasks, float64; see the module's text.

    Attributes:
        entries: how many entries the modules have together.
        norm: Frobenius norms, [T].
        nuclear: nuclear norms, [T].
        density: [T].
        collision: [T, T], the densities on the diagonal.
        cosine: [T, T], nan where one of the two changed nothing.
        overlap: [T, T], nan as there.
    """

    entries: int
    norm: Tensor
    nuclear: Tensor
    density: Tensor
    collision: Tensor
    cosine: Tensor
    overlap: Tensor


def added(after: Adapter, before: Adapter | None = None) -> Change:
    """Return the change of the weights from one adapter to another, exact but for float64.

    s B A - s' B' A' has the factors [s B, -s' B'] and [A; A'], so ranks may differ and no
    [d_out, d_in] matrix is made.

    Args:
        after: the later adapter.
        before: the earlier one, of the same modules; None: the bare base model.
    """
    modules = [key.removesuffix(A_KEY) for key in after.tensors if key.endswith(A_KEY)]
    return {module: _added(module, after, before) for module in modules}


def _added(module: str, after: Adapter, before: Adapter | None) -> Part:
    ups, downs = _factors(module, after)
    if before is None:
        return _decomposed(ups, downs)
    earlier_ups, earlier_downs = _factors(module, before)
    kept = len(earlier_downs)
    if torch.equal(downs[:kept], earlier_downs) and torch.equal(ups[:, :kept], earlier_ups):
        # The sum of all tasks' adapters, rank-concatenated: what was added is the rest.
        return _decomposed(ups[:, kept:], downs[kept:])
    return _decomposed(torch.cat([ups, -earlier_ups], dim=1), torch.cat([downs, earlier_downs]))


def _factors(module: str, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return s B [d_out, r] and A [r, d_in], float64."""
    ups = adapter.tensors[f"{module}{B_KEY}"].double() * adapter.scale
    return ups, adapter.tensors[f"{module}{A_KEY}"].double()


def _decomposed(ups: Tensor, downs: Tensor) -> Part:
    """Return the SVD of ups @ downs, [d_out, k] and [k, d_in], without the product."""
    left, upper = torch.linalg.qr(ups)
    right, lower = torch.linalg.qr(downs.T)
    u, values, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    rank = int((values > _ROUNDING * ups.norm() * downs.norm()).sum())
    return Part(left @ u[:, :rank], values[:rank], vh[:rank] @ right.T)


def evidence(
    changes: Sequence[Change],
    threshold: float = THRESHOLD,
    *,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Compare what T tasks changed.

    Args:
        changes: of the same modules, at least one.
        threshold: in root mean squares of a task's own entries; see the module's text.
        chunk: entries made at a time, over all tasks; changes the memory, not the numbers.
        progress: told how many of how many modules are done.

    Returns:
        The numbers. A task that changed nothing has norm and density 0.
    """
    modules = list(changes[0])
    total = sum(_entries(changes[0][module]) for module in modules)
    values = [torch.cat([change[module].values for module in modules]) for change in changes]
    norm = torch.stack([value.norm() for value in values])
    marks = threshold * norm / math.sqrt(total)
    tasks = len(changes)
    counts, inner, shared = (torch.zeros(tasks, tasks, dtype=torch.float64) for _ in range(3))
    for done, module in enumerate(modules, start=1):
        parts = [change[module] for change in changes]
        counts += _colliding(parts, marks, chunk)
        products, overlaps = _products(parts)
        inner += products
        shared += overlaps
        if progress is not None:
            progress(done, len(modules))
    return Evidence(
        entries=total,
        norm=norm,
        nuclear=torch.stack([value.sum() for value in values]),
        density=counts.diagonal() / total,
        collision=counts / total,
        cosine=_normalised(inner),
        overlap=_normalised(shared),
    )


def _entries(part: Part) -> int:
    return part.left.shape[0] * part.right.shape[1]


def _products(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Return <W_i, W_j> and |W_i W_j'|^2 of one module, [T, T] each.

    With W = sum_a s_a u_a v_a' they are the sums over a of i and b of j of
    s_a s_b (u_a' u_b) (v_a' v_b) and of (s_a s_b (v_a' v_b))^2.
    """
    ranks = torch.tensor([len(part.values) for part in parts])
    # One row for each singular value, with a 1 at the task it belongs to.
    owner = torch.eye(len(parts), dtype=torch.float64).repeat_interleave(ranks, dim=0)
    values = torch.cat([part.values for part in parts])
    lefts = torch.cat([part.left for part in parts], dim=1)
    rights = torch.cat([part.right for part in parts])
    sides = values[:, None] * values * (rights @ rights.T)
    inner = owner.T @ (sides * (lefts.T @ lefts)) @ owner
    return inner, owner.T @ sides.square() @ owner


def _normalised(products: Tensor) -> Tensor:
    """Divide inner products by the norms; the mean with the transpose makes them symmetric."""
    norms = products.diagonal().sqrt()
    return (products + products.T) / (2 * norms[:, None] * norms)


def _colliding(parts: Sequence[Part], marks: Tensor, chunk: int) -> Tensor:
    """Count the entries of one module that are above the marks of both tasks, [T, T]."""
    height, width = parts[0].left.shape[0], parts[0].right.shape[1]
    rows = max(1, chunk // (len(parts) * width))
    counts = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for start in range(0, height, rows):
        above = torch.stack(
            [
                ((part.left[start : start + rows] * part.values) @ part.right).abs() > mark
                for part, mark in zip(parts, marks, strict=True)
            ]
        )
        # As float32, since whole numbers have no fast matrix product: sums of ones are exact in it
        # up to 2^24.
        ones = above.flatten(1).float()
        counts += ones @ ones.T
    return counts
