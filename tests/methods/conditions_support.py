"""Prompts of unequal length, and a task learned by hand, for methods that look at prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rows_support import move, task
from torch import Tensor

from treelora_cli.methods.base import Method, StoredTask
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.snapshot import Snapshot


def prompts(lengths: Sequence[int], seed: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return ids and mask of random prompts; what stands where the mask is 0 is random too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 320, (len(lengths), max(lengths)), generator=generator)
    columns = torch.arange(max(lengths))
    if left:
        columns = columns.flip(0)
    return ids, (columns < torch.tensor(lengths).unsqueeze(1)).long()


def mean_of_tokens(method: Method, ids: Tensor, mask: Tensor) -> np.ndarray:
    """Return each prompt's mean embedding, by a loop over its tokens, [B, H]."""
    table = method.model.backbone.model.get_input_embeddings().weight.detach().double().numpy()
    return np.stack(
        [
            np.mean([table[token] for token, one in zip(row, real, strict=True) if one], axis=0)
            for row, real in zip(ids.tolist(), mask.tolist(), strict=True)
        ]
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def learn(
    method: Method, finished: list[StoredTask], rows: Sequence[Example], size: float = 0.1
) -> StoredTask:
    """Go through a task with a random step in place of training; it is added to the finished."""
    index = len(finished)
    context = task(method.model, index, rows)
    method.begin_task(context)
    move(method.model, index, size)
    memory = method.end_task(context)
    answer: Snapshot = method.model.answer()
    finished.append(StoredTask(index, context.name, memory, lambda: answer))
    method.install(finished)
    return finished[-1]


def batch_of(rows: Sequence[Example]):
    return collate(list(rows), 0)
