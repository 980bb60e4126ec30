"""Signatures of finished tasks and the distances between them.

A signature is one float32 vector of F entries, the concatenation of D blocks (transformer layers
in depth order) whose widths F_d may differ. All distances are per-entry means inside a block and
averages over blocks, so that neither a wide block nor a deep model weighs more (design 5.1.3).

What an optimizer step calls (``xi_of``, ``pull``, ``xi``, ``scaled_distances``) never asks a tensor
for its values, on any device: that would stall an accelerator. A distance that is not finite is
refused by ``Search.update``, a signature that is not when it is stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treelora_cli.errors import DivergedError
from treelora_cli.tree import sampling
from treelora_cli.tree.rows import GrowingRows

# Entries that are added up at a time (64 MiB of float32), and that are compared at a time: few
# enough to stay near the processor.
_CHUNK_ENTRIES = 1 << 24
_COMPARED_ENTRIES = 1 << 18

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
    # Given by `add` alone, which has checked the new row and knows the others.
    _rows: GrowingRows | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self._rows is not None:
            return
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
        rows = GrowingRows(self.names, self.values, self.displacements)
        object.__setattr__(self, "_rows", rows)

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

        Both share their storage: a stream of additions costs O(F) each, amortised. A second task
        added to the same bank gets storage of its own.

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
        rows, n = self._storage, len(self)
        if rows.places.get(name, n) < n:
            raise ValueError(f"the task name {name} occurs twice")
        rows = rows.with_one_more(self.names, name, row, moved)
        return SignatureBank(
            (*self.names, name),
            rows.values[: n + 1],
            self.widths,
            rows.displacements[: n + 1],
            rows,
        )

    def thinned(self, limit: int) -> SignatureBank:
        """Return a bank of at most ``limit`` evenly spaced entries of each block, copied."""
        columns, widths = sampling.some_entries(self.widths, limit)
        values = self.values.index_select(1, columns)
        return SignatureBank(self.names, values, widths, self.displacements)

    def mean(self, tasks: Sequence[int]) -> Tensor:
        """Return the mean signature of some tasks, float32 [F] on the host."""
        if len(tasks) == 1:
            return self.values[tasks[0]]
        if len(tasks) == len(self) and list(tasks) == list(range(len(self))):
            return self.values.mean(0)
        total = torch.zeros(self.entries)
        for part in self._parts(tasks, _CHUNK_ENTRIES):
            total += self._some(part).sum(0)
        return total / len(tasks)

    def scales(self) -> Tensor:
        """Return c_d, float32 [D]: the tasks' mean distance to their mean at block d.

        It is 1 where it is undefined or zero (no task, one task, or tasks that differ by no more
        than float32 rounding there), so that it can always divide. Fixed at task start. Of more
        than ``sampling.EXACT_TASKS`` tasks an evenly spaced sample of 129 to 256 stands for all:
        c_d is then right to a few hundredths of itself, and stays the same until the sample
        changes. The result is kept; do not change it.

        Raises:
            DivergedError: the stored values are so large that their mean is not finite.
        """
        if len(self) == 0:
            return torch.ones(self.blocks)
        chosen = sampling.evenly(range(len(self)), sampling.EXACT_TASKS)
        known = self._storage.scales
        if known is not None and known[0] == chosen:
            return known[1]
        centre = self.mean(chosen)
        spread = self.block_distances(centre, chosen).mean(0)
        _require_finite(spread, "the stored signatures' distance to their mean")
        noise = _ROUNDING * block_means(centre.abs(), self.widths)
        scales = torch.where(spread > noise, spread, torch.ones_like(spread))
        self._storage.scales = chosen, scales
        return scales

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
        """
        live = self._query(query)
        chosen = range(len(self)) if arms is None else arms
        parts = [
            block_means((self._some(part).to(live.device) - live).abs_(), self.widths)
            for part in self._parts(chosen, _COMPARED_ENTRIES)
        ]
        return torch.cat(parts) if parts else live.new_zeros((0, self.blocks))

    def row(self, arms: Sequence[int]) -> Tensor:
        """Return what a pull of these arms compares with, float32 [F] on the host.

        It depends on the choice alone, so it can be on its way to an accelerator before the live
        signature is known; ``xi_of`` then takes it.

        Args:
            arms: one task (scope ``model``): its signature, a view; or D tasks (scope ``block``):
                see ``gather``.
        """
        return self.gather(arms) if len(arms) > 1 else self.values[arms[0]]

    def gather(self, arms: Sequence[int]) -> Tensor:
        """Return float32 [F] whose block d is that of task ``arms[d]``, a copy on the host."""
        pieces, start = [], 0
        for arm, width in zip(arms, self.widths, strict=True):
            pieces.append(self.values[arm, start : start + width])
            start += width
        return torch.cat(pieces)

    def xi(self, query: Tensor, arm: int, scales: Tensor) -> Tensor:
        """Return the scalar xi of one pull of one arm; see ``pull``."""
        return self.pull(query, [arm], scales)[0]

    def xi_all(self, query: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [N]: ``xi`` of every arm.

        Raises:
            DivergedError: the query is on the host and not finite.
        """
        found = self.scaled_distances(query, scales).mean(1)
        _require_finite(found, "the current signature")
        return found

    def scaled_distances(self, query: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [N, D]: every arm's term of xi at every block."""
        distances = self.block_distances(query)
        return distances / scales.to(distances.device)

    def pull(self, query: Tensor, arms: Sequence[int], scales: Tensor) -> Tensor:
        """Return what a ``ScopedSearch`` observes, float32 [len(arms)] on the query's device.

        Args:
            query: [F], the live signature.
            arms: one arm (scope ``model``) or D arms (scope ``block``).
            scales: c_d, [D], from ``scales()``.
        """
        scope = "model" if len(arms) == 1 else "block"
        return xi_of(self._query(query), self.row(arms), scales, self.widths, scope)

    @property
    def _storage(self) -> GrowingRows:
        assert self._rows is not None
        return self._rows

    def _query(self, query: Tensor) -> Tensor:
        if query.shape != (self.entries,):
            raise ValueError(f"a signature must be [{self.entries}], not {list(query.shape)}")
        return query.detach().float()

    def _row(self, signature: Tensor, what: str) -> Tensor:
        row = self._query(signature).to("cpu")
        _require_finite(row, what)
        return row

    def _parts(self, tasks: Sequence[int], entries: int) -> Iterator[Sequence[int]]:
        step = max(1, entries // self.entries)
        for start in range(0, len(tasks), step):
            yield tasks[start : start + step]

    def _some(self, tasks: Sequence[int]) -> Tensor:
        """Return the signatures of some tasks, [n, F]; a view where they are evenly spaced."""
        if isinstance(tasks, range):
            return self.values[tasks.start : tasks.stop : tasks.step]
        return self.values[list(tasks)]


def xi_of(
    query: Tensor, row: Tensor, scales: Tensor, widths: tuple[int, ...], scope: str = "model"
) -> Tensor:
    """Return the feedback of one pull, float32 [1] (scope ``model``) or [D] (scope ``block``).

    xi = (1/D) sum_d mean|s^d - s_k^d| / c_d, the per-entry and scaled form of the paper's
    feedback; in scope ``block`` search d gets its own term alone. The result stays on the query's
    device and carries no graph, so reading it can wait.

    Args:
        query: [F], the live signature, any floating dtype.
        row: [F], from ``SignatureBank.row``; copied to the query's device if it is not there.
        scales: c_d, [D], from ``SignatureBank.scales()``.
        widths: F_d.
        scope: ``model`` or ``block``.
    """
    live = query.detach().float()
    gaps = (row.to(live.device, non_blocking=True) - live).abs_()
    terms = block_means(gaps, widths) / scales.to(live.device)
    return terms.mean(0, keepdim=True) if scope == "model" else terms


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
