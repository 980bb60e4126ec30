"""Signatures of finished tasks and the distances between them.

A signature is one float32 vector of F entries, the concatenation of D blocks (transformer layers
in depth order) whose widths F_d may differ. All distances are per-entry means inside a block and
averages over blocks, so that neither a wide block nor a deep model weighs more (design 5.1.3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.errors import DivergedError

# Entries of the largest temporary that a batched distance makes (64 MiB of float32).
_CHUNK_ENTRIES = 1 << 24

# Below this share of a block's own magnitude a spread is float32 rounding, not a difference.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class SignatureBank:
    """The signatures of all stored tasks, in the order in which the tasks were learned.

    Attributes:
        names: N task names; the position of a name is the task's index (the bandit's arm).
        values: float32 [N, F], on the host (may be memory-mapped).
        widths: F_d of each of the D blocks in depth order; they sum to F.
        displacements: float32 [N, D], the mean absolute displacement of each block of each task
            (how far its adapter moved), in the unit of the adapter's weights.

    Raises:
        ValueError: shapes, dtypes or names do not fit together.
        DivergedError: a value is not finite.
    """

    names: tuple[str, ...]
    values: Tensor
    widths: tuple[int, ...]
    displacements: Tensor

    def __post_init__(self) -> None:
        n, total = len(self.names), sum(self.widths)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"every block needs at least one entry, not widths {self.widths}")
        if len(set(self.names)) != n:
            raise ValueError("a task name occurs twice")
        for what, tensor, shape in (
            ("values", self.values, (n, total)),
            ("displacements", self.displacements, (n, len(self.widths))),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{what} must be float32 {list(shape)}, not {found}")

    @classmethod
    def empty(cls, widths: Sequence[int]) -> SignatureBank:
        """Return a bank without tasks for blocks of the given widths."""
        sizes = tuple(int(width) for width in widths)
        return cls((), torch.zeros(0, sum(sizes)), sizes, torch.zeros(0, len(sizes)))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def blocks(self) -> int:
        """The number of blocks D."""
        return len(self.widths)

    @property
    def entries(self) -> int:
        """The number of entries F of one signature."""
        return sum(self.widths)

    def add(self, name: str, signature: Tensor, displacement: Tensor) -> SignatureBank:
        """Return a new bank with one more task; this one stays as it is.

        Args:
            name: the task's name, not yet in the bank.
            signature: [F], any floating dtype and device; copied to the host as float32.
            displacement: [D], mean absolute displacement of each block, not negative.

        Raises:
            DivergedError: an entry is not finite.
            ValueError: a shape does not fit, or the name is taken.
        """
        row = self._row(signature, f"the signature of task {name}")
        moved = displacement.detach().to("cpu", torch.float32)
        if moved.shape != (self.blocks,):
            raise ValueError(f"displacement must be [{self.blocks}], not {list(moved.shape)}")
        _require_finite(moved, f"the displacement of task {name}")
        return SignatureBank(
            (*self.names, name),
            torch.cat([self.values, row.unsqueeze(0)]),
            self.widths,
            torch.cat([self.displacements, moved.unsqueeze(0)]),
        )

    def mean(self, tasks: Sequence[int]) -> Tensor:
        """Return the mean signature of some tasks, float32 [F] on the host."""
        if len(tasks) == 1:
            return self.values[tasks[0]]
        if list(tasks) == list(range(len(self))):
            return self.values.mean(0)
        total = torch.zeros(self.entries)
        for part in self._parts(tasks):
            total += self.values[part].sum(0)
        return total / len(tasks)

    def scales(self) -> Tensor:
        """Return c_d, float32 [D]: the tasks' mean distance to their mean at block d.

        It is 1 where it is undefined or zero (no task, one task, or tasks that differ by no more
        than float32 rounding there), so that it can always divide. Fixed at task start.
        """
        if len(self) == 0:
            return torch.ones(self.blocks)
        centre = self.mean(range(len(self)))
        spread = self.block_distances(centre).mean(0)
        noise = _ROUNDING * block_means(centre.abs(), self.widths)
        return torch.where(spread > noise, spread, torch.ones_like(spread))

    def displacement_scale(self) -> Tensor:
        """Return m_d, float32 [D]: the mean over tasks of their displacement; 0 without tasks."""
        if len(self) == 0:
            return torch.zeros(self.blocks)
        return self.displacements.mean(0)

    def block_distances(self, query: Tensor, arms: Sequence[int] | None = None) -> Tensor:
        """Return float32 [n, D]: mean absolute difference per block of the query to each arm.

        Args:
            query: [F], any floating dtype; the result lies on its device.
            arms: task indices; None means all N.

        Raises:
            DivergedError: the query is on the host and not finite.
        """
        live = self._query(query)
        chosen = range(len(self)) if arms is None else arms
        parts = [
            block_means((self.values[part].to(live.device) - live).abs_(), self.widths)
            for part in self._parts(chosen)
        ]
        if not parts:
            return live.new_zeros((0, self.blocks))
        distances = torch.cat(parts)
        _require_finite(distances, "the current signature")
        return distances

    def block_xi(self, query: Tensor, arms: Sequence[int], scales: Tensor) -> Tensor:
        """Return float32 [D]: block d's own term of xi for the arm chosen at block d.

        Args:
            query: [F].
            arms: D task indices, one a block (search scope ``block``).
            scales: c_d, [D], from ``scales()``.

        Raises:
            DivergedError: the query is on the host and not finite.
        """
        live = self._query(query)
        row = self.gather(arms).to(live.device)
        distances = block_means((row - live).abs_(), self.widths)
        _require_finite(distances, "the current signature")
        return distances / scales.to(live.device)

    def gather(self, arms: Sequence[int]) -> Tensor:
        """Return float32 [F] whose block d is that of task ``arms[d]``."""
        pieces, start = [], 0
        for arm, width in zip(arms, self.widths, strict=True):
            pieces.append(self.values[arm, start : start + width])
            start += width
        return torch.cat(pieces)

    def xi(self, query: Tensor, arm: int, scales: Tensor) -> Tensor:
        """Return the scalar xi of one pull: the mean over blocks of the scaled distance.

        xi = (1/D) sum_d mean|s^d - s_k^d| / c_d, the per-entry and scaled form of the paper's
        feedback. The scalar stays on the query's device, so reading it can wait.

        Args:
            query: [F], the live signature.
            arm: index of the task to compare with.
            scales: c_d, [D], from ``scales()``.

        Raises:
            DivergedError: the query is on the host and not finite. On an accelerator the check
                would stall the step; there ``Search.update`` makes it.
        """
        live = self._query(query)
        row = self.values[arm].to(live.device, non_blocking=True)
        distances = block_means((row - live).abs_(), self.widths)
        value = (distances / scales.to(live.device)).mean()
        _require_finite(value, "the current signature")
        return value

    def xi_all(self, query: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [N]: ``xi`` of every arm. Raises as ``xi`` does."""
        return self.scaled_distances(query, scales).mean(1)

    def scaled_distances(self, query: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [N, D]: every arm's term of xi at every block. Raises as ``xi`` does."""
        distances = self.block_distances(query)
        return distances / scales.to(distances.device)

    def pull(self, query: Tensor, arms: Sequence[int], scales: Tensor) -> Tensor:
        """Return what a ``ScopedSearch`` observes, float32 [len(arms)]: one xi a search.

        Args:
            query: [F].
            arms: one arm (scope ``model``) or D arms (scope ``block``).
            scales: c_d, [D], from ``scales()``.

        Raises:
            DivergedError: the query is on the host and not finite.
        """
        if len(arms) == 1:
            return self.xi(query, arms[0], scales).unsqueeze(0)
        return self.block_xi(query, arms, scales)

    def _query(self, query: Tensor) -> Tensor:
        if query.shape != (self.entries,):
            raise ValueError(f"a signature must be [{self.entries}], not {list(query.shape)}")
        return query.detach().float()

    def _row(self, signature: Tensor, what: str) -> Tensor:
        row = self._query(signature).to("cpu")
        _require_finite(row, what)
        return row

    def _parts(self, tasks: Sequence[int]) -> Iterator[list[int]]:
        step = max(1, _CHUNK_ENTRIES // self.entries)
        for start in range(0, len(tasks), step):
            yield list(tasks[start : start + step])


def block_means(entries: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return the mean of each block of the last dimension.

    Args:
        entries: float32 [..., F].
        widths: the D block widths, which sum to F.

    Returns:
        float32 [..., D].
    """
    # Chunks of the greatest common divisor never straddle two blocks: most of the sum is one
    # plain reduction, and only F / step values are left for the segments of unequal blocks.
    step = math.gcd(*widths)
    chunks = entries.reshape(*entries.shape[:-1], -1, step).sum(-1)
    if len(widths) * step == entries.shape[-1]:
        return chunks / step
    lengths, sizes = _segments(widths, step, entries.device)
    sums = torch.segment_reduce(
        chunks.double().movedim(-1, 0).contiguous(), "sum", lengths=lengths, axis=0, unsafe=True
    )
    means: Tensor = (sums.movedim(0, -1) / sizes).to(entries.dtype)
    return means


@functools.lru_cache(maxsize=32)
def _segments(widths: tuple[int, ...], step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor(widths, device=device)
    return sizes // step, sizes.double()


def _require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity, on the host only: asking an accelerator would stall the step."""
    if tensor.device.type == "cpu" and not bool(torch.isfinite(tensor).all()):
        raise DivergedError(
            f"{what} has values that are not finite numbers",
            "training has diverged: lower optim.lr or the penalty's weight",
        )
