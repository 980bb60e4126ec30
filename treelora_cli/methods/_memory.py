"""Rows of finished tasks, kept for later: chosen by a seed, stored as tensors, drawn by step.

Every choice is a function of a seed and, where batches are drawn, of the step alone, so that a
resumed run draws what the interrupted one would have drawn and nothing has to be checkpointed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.models.encode import Example

TOKENS, LENGTHS, STARTS, FLAGS = "rows.tokens", "rows.lengths", "rows.starts", "rows.flags"
"""Keys of a memory's tensors among those a task stores."""
_TRUNCATED, _APART = 1, 2


@dataclass(frozen=True)
class Memory:
    """Tokenised rows of a finished task.

    Attributes:
        rows: the rows, in the order in which they are stored.
    """

    rows: list[Example]

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the rows as tensors.

        Returns:
            ``rows.tokens`` int32 [all tokens], the rows behind one another; ``rows.lengths`` and
            ``rows.starts`` int32 [rows], tokens of a row and of its prompt; ``rows.flags`` uint8
            [rows], 1 if truncated, plus 2 if the answer is a decoder's.
        """
        tokens = [token for row in self.rows for token in row.tokens]
        flags = [_TRUNCATED * row.truncated + _APART * row.apart for row in self.rows]
        return {
            TOKENS: torch.tensor(tokens, dtype=torch.int32),
            LENGTHS: torch.tensor([len(row.tokens) for row in self.rows], dtype=torch.int32),
            STARTS: torch.tensor([row.answer_start for row in self.rows], dtype=torch.int32),
            FLAGS: torch.tensor(flags, dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], task: str) -> Memory:
        """Read rows back.

        Args:
            tensors: those of ``tensors``, perhaps among others.
            task: whose they are, for messages.

        Raises:
            RunDirError: a tensor is missing, or they do not fit one another.
        """
        found = [tensors.get(key) for key in (TOKENS, LENGTHS, STARTS, FLAGS)]
        if any(tensor is None or tensor.dim() != 1 for tensor in found):
            raise _damaged(task)
        tokens, lengths, starts, flags = (t.tolist() for t in found if t is not None)
        fits = len(lengths) == len(starts) == len(flags) and sum(lengths) == len(tokens)
        whole = all(0 < s < n for s, n in zip(starts, lengths, strict=False))
        if not (fits and whole and min(tokens, default=0) >= 0):
            raise _damaged(task)
        ends = np.cumsum([0, *lengths]).tolist()
        return cls(
            [
                Example(tuple(tokens[a:b]), start, bool(flag & _TRUNCATED), bool(flag & _APART))
                for (a, b), start, flag in zip(pairwise(ends), starts, flags, strict=True)
            ]
        )


def _damaged(task: str) -> RunDirError:
    return RunDirError(
        f"the stored rows of task {task} are damaged or missing",
        "put the task's method.safetensors back, or start a new run",
    )


def generator(seed: int, *parts: int, device: torch.device | None = None) -> torch.Generator:
    """Return a generator, on the host by default, that depends on a seed and all more numbers."""
    state = np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)
    return torch.Generator(device or "cpu").manual_seed(int(state[0]) >> 1)


def sample_rows(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Choose rows at random, none twice; all of them, in their order, where there are no more.

    Args:
        rows: what to choose from; their order is kept.
        count: how many.
        seed: decides the choice, e.g. the task's.
    """
    return _chosen(rows, count, generator(seed))


def draw(rows: Sequence[Example], count: int, seed: int, step: int) -> list[Example]:
    """Draw a step's rows at random, none twice within a step; all where there are no more.

    Args:
        rows: what to draw from; their order is kept.
        count: how many.
        seed: e.g. the task's.
        step: of the task; another step draws anew.
    """
    return _chosen(rows, count, generator(seed, step))


def _chosen(rows: Sequence[Example], count: int, source: torch.Generator) -> list[Example]:
    if count >= len(rows):
        return list(rows)
    order = torch.randperm(len(rows), generator=source)[:count]
    return [rows[at] for at in order.sort().values.tolist()]


def reservoir(
    held: Sequence[Example], seen: int, rows: Sequence[Example], count: int, seed: int
) -> list[Example]:
    """Go on with a sample of all rows so far: every one of them is held equally likely.

    Algorithm R of Vitter (1985): row number n, from 1, takes a random place among n, and is held
    if that is one of the places there are.

    Args:
        held: the sample of the rows before.
        seen: how many rows there were before.
        rows: the new ones, in order.
        count: places of the sample.
        seed: decides the choice; another one for every call.
    """
    sample = list(held)
    source = generator(seed)
    for number, row in enumerate(rows, start=seen + 1):
        if len(sample) < count:
            sample.append(row)
            continue
        place = int(torch.randint(number, (), generator=source))
        if place < count:
            sample[place] = row
    return sample
