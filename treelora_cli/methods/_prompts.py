"""What the methods that look at a prompt's words share: its mean embedding, and soft prompts.

The query of a prompt is the mean of its tokens' input embeddings under the frozen base, padding and
answer left out. It costs a look-up, needs no forward pass of its own, and never changes, so keys
that were fitted to a task's prompts stay where that task's prompts are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.soft import embed


def mean_embedding(model: AdaptedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean input embedding of every prompt, float32 [B, H], outside the graph.

    Args:
        model: its base embeds.
        ids: int64 [B, S].
        mask: int64 [B, S], 1 for the tokens of the prompts.
    """
    with torch.no_grad():
        embedded = embed(model.backbone.model, ids).float()
        weights = mask.to(embedded.dtype).unsqueeze(2)
        return (embedded * weights).sum(1) / weights.sum(1).clamp(min=1)


def drawn_embeddings(model: AdaptedModel, count: int, seed: int) -> Tensor:
    """Return the embeddings of tokens drawn at random from the vocabulary, float32 [count, H].

    Args:
        model: its base embeds.
        count: how many.
        seed: decides which.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(model.backbone.tokenizer), (1, count), generator=generator)
    with torch.no_grad():
        return embed(model.backbone.model, ids.to(model.device))[0].float()


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the cosine of every query [B, H] with every key [K, H], [B, K]."""
    return functional.normalize(queries, dim=1) @ functional.normalize(keys, dim=1).T
