"""What a prompt looks like to the frozen base: a short vector, for routing without a task's name.

Three views of the tokens that are read, each an RMS-normed hidden state of the base (of its encoder
if it has one) with the adapter switched off: the middle layer's mean over the beginning (where
instructions stand), the last layer's mean over all (what the text is about) and the last layer's
last token (how it ends).
tests/routing/routing_trial.py compares this choice with others.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder, pad_prompts, positions_of

READ = 256
"""Tokens read of a prompt; of a longer one three quarters of them from its beginning."""

HEAD = 64
"""Tokens at the beginning that the first view is the mean of."""

WIDTH = 512
"""The most entries of a feature vector."""

Pooling = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Takes L + 1 hidden states [B, S, H] and the mask [B, S], gives features [B, W] on the host."""

_TINY = 1e-12


def pool(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the features of a batch, float32 [B, W] on the host.

    The first token is left out of the means where there is another: whatever it is, models use it
    as a resting place for attention and give it a state many times larger than any other.

    Args:
        states: L + 1 hidden states [B, S, H], padded on either side.
        mask: int64 [B, S], 1 for real tokens; at least one a row.
    """
    positions = positions_of(mask)
    ends = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    counted = mask.bool() & ((positions > 0) | (mask.sum(1, keepdim=True) == 1))
    middle, last = normed(states[len(states) // 2]), normed(states[-1])
    views = [
        mean_over(middle, counted & (positions < HEAD)),
        mean_over(last, counted),
        last[torch.arange(len(ends), device=ends.device), ends],
    ]
    return project(torch.cat(views, dim=1).cpu())


def normed(state: Tensor) -> Tensor:
    """Divide each token's state by its root mean square, so that none outweighs the others."""
    values = state.float()
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + _TINY)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean [B, H] of values [B, S, H] over the positions counted [B, S]."""
    weights = counted.float()
    return torch.einsum("bsh,bs->bh", values, weights) / weights.sum(1, keepdim=True)


def project(features: Tensor, width: int = WIDTH) -> Tensor:
    """Return float32 [n, F] as it is, or where F is larger than ``width`` in that many entries.

    The projection has fixed random signs over the square root of ``width``, which keeps inner
    products up to a small error (Achlioptas 2003).
    """
    if features.shape[1] <= width:
        return features
    return features @ _signs(features.shape[1], width) / math.sqrt(width)


@functools.lru_cache(maxsize=2)
def _signs(rows: int, columns: int) -> Tensor:
    """Return float32 [rows, columns] of -1 and 1, from a hash: the same in every torch version."""
    count = rows * columns
    stream = hashlib.shake_256(b"treelora prompt features 1").digest(-(-count // 8))
    packed = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    signs: Tensor = bits.flatten()[:count].reshape(rows, columns).float() * 2 - 1
    return signs


def prompt_features(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    batch_size: int = 8,
    on_batch: Callable[[], None] = lambda: None,
    pooling: Pooling = pool,
) -> Tensor:
    """Return the features of prompts, from the base without its adapter and without logits.

    Of an encoder-decoder it is the encoder that reads. Batching and padding change features by
    rounding only. Every layer's hidden states of a batch are held at once: at 256 tokens, 8 prompts
    and a 7B model in bfloat16 about half a gigabyte.

    Args:
        adapted: the model; its live adapter, mode and trainability are as before afterwards.
        encoder: tokenises prompts as for generation.
        prompts: the texts.
        batch_size: prompts a batch, batched by length.
        on_batch: called before every batch; may raise to stop.
        pooling: makes the features of a batch of hidden states and mask.

    Returns:
        float32 [n, min(3 hidden sizes, 512)] on the host; [0, 0] of no prompts.
    """
    # A prompt without any token is read as the end token alone.
    read = [encoder.prompt(prompt)[0] or [encoder.eos] for prompt in prompts]
    return token_features(adapted, read, batch_size, on_batch, pooling)


def token_features(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    batch_size: int = 8,
    on_batch: Callable[[], None] = lambda: None,
    pooling: Pooling = pool,
) -> Tensor:
    """As :func:`prompt_features`, of prompts as they are tokenised for generation, none empty."""
    tokens = [shorten(prompt) for prompt in prompts]
    pad = adapted.backbone.tokenizer.pad_token_id
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found: dict[int, Tensor] = {}
    left = not adapted.backbone.encodes
    with adapted.evaluating(), adapted.as_base(), torch.inference_mode():
        for start in range(0, len(by_length), batch_size):
            on_batch()
            chosen = by_length[start : start + batch_size]
            ids, mask = pad_prompts([tokens[i] for i in chosen], pad, left=left)
            states = _hidden_states(adapted, ids, mask)
            found.update(zip(chosen, pooling(states, mask.to(adapted.device)), strict=True))
    return torch.stack([found[i] for i in range(len(tokens))]) if tokens else torch.zeros(0, 0)


def shorten(tokens: Sequence[int], read: int = READ) -> list[int]:
    """Return at most ``read`` tokens: a long prompt's first three quarters of them and its last."""
    if len(tokens) <= read:
        return list(tokens)
    tail = read // 4
    return [*tokens[: read - tail], *tokens[len(tokens) - tail :]]


def _hidden_states(adapted: AdaptedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return the L + 1 hidden states [B, S, H] of the base, or of its encoder where it has one."""
    model = adapted.backbone.model
    body = model.get_encoder() if adapted.backbone.encodes else model.base_model
    inputs: dict[str, Any] = {
        "input_ids": ids.to(adapted.device),
        "attention_mask": mask.to(adapted.device),
        "output_hidden_states": True,
    }
    accepted = inspect.signature(body.forward).parameters
    if "position_ids" in accepted:
        inputs["position_ids"] = positions_of(mask).to(adapted.device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    states: tuple[Tensor, ...] = body(**inputs).hidden_states
    return states
