"""What a model reads of prompts: their tokens, and before them the soft prompts of a condition.

Soft prompts are put before the first real token of a row, as embeddings: where the model's own
embedding layer gives those of tokens, scaled if it scales them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.recipe import DataSection

Inputs = dict[str, Any]
"""Arguments of a model."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Prompts as they are padded.

    Attributes:
        ids: int64 [B, S].
        mask: int64 [B, S], 1 for what is read; None: all of it.
    """

    ids: Tensor
    mask: Tensor | None

    def inputs(self) -> Inputs:
        """Return the model's arguments."""
        inputs = {"input_ids": self.ids}
        return inputs if self.mask is None else inputs | {"attention_mask": self.mask}


def at_the_start(model: Any, soft: Tensor, reading: Reading) -> Inputs:
    """Return the model's arguments for soft prompts and the rows behind them.

    Args:
        model: a transformers model.
        soft: [B, W, hidden], in the graph.
        reading: rows that begin at column 0, padded on the right if at all.

    Returns:
        ``inputs_embeds`` [B, W + S, hidden] in the dtype of the embedding layer, and where there
        is a mask ``attention_mask`` [B, W + S].
    """
    embedded = embed(model, reading.ids)
    inputs = {"inputs_embeds": torch.cat([soft.to(embedded.dtype), embedded], dim=1)}
    if reading.mask is not None:
        front = reading.mask.new_ones(soft.shape[:2])
        inputs["attention_mask"] = torch.cat([front, reading.mask], dim=1)
    return inputs


def behind_padding(model: Any, soft: Tensor, ids: Tensor, mask: Tensor) -> Inputs:
    """Return the arguments of ``at_the_start`` for rows padded on the left.

    Padding stays leftmost, so that a window over the last tokens holds no padding.
    """
    whole = at_the_start(model, soft, Reading(ids, mask))
    width = soft.shape[1]
    columns = torch.arange(width + ids.shape[1], device=ids.device)
    pads = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    # Column by column, where it comes from: first the padding, then the soft prompt, then the rest.
    source = torch.where(columns < pads + width, columns - pads, columns)
    source = torch.where(columns < pads, columns + width, source)
    embedded = whole["inputs_embeds"]
    return {
        "inputs_embeds": embedded.take_along_dim(source.unsqueeze(2), dim=1),
        "attention_mask": whole["attention_mask"].take_along_dim(source, dim=1),
    }


def embed(model: Any, ids: Tensor) -> Tensor:
    """Return what a model's embedding layer gives for tokens, [B, S, hidden]."""
    embedded: Tensor = model.get_input_embeddings()(ids)
    return embedded


@contextmanager
def answering(adapted: AdaptedModel, ids: Tensor, mask: Tensor) -> Iterator[Inputs]:
    """Enclose the answering of one batch of prompts, which the condition sees first.

    Args:
        adapted: the model; without a condition the prompts are read as they are.
        ids: int64 [B, S] on the model's device; padded on the left for a causal model, on the right
            for an encoder.
        mask: int64 [B, S], 1 for real tokens.

    Yields:
        The model's arguments: ``attention_mask``, and ``input_ids`` or, behind soft prompts,
        ``inputs_embeds``.
    """
    condition = adapted.condition
    if condition is None:
        yield Reading(ids, mask).inputs()
        return
    soft = condition.read(ids, mask)
    with condition.answering(ids, mask):
        model = adapted.backbone.model
        if soft is None:
            yield Reading(ids, mask).inputs()
        elif adapted.backbone.encodes:
            yield at_the_start(model, soft, Reading(ids, mask))
        else:
            yield behind_padding(model, soft, ids, mask)


def soft_width(adapted: AdaptedModel) -> int:
    """Return how many soft tokens are read before every prompt."""
    return 0 if adapted.condition is None else adapted.condition.width


def most_rows(adapted: AdaptedModel, wanted: int) -> int:
    """Return the most rows of a batch of answers: as wanted, or what the condition can take."""
    limit = None if adapted.condition is None else adapted.condition.rows
    return wanted if limit is None else min(wanted, limit)


def require_condition(adapted: AdaptedModel, data: DataSection, *, packing: bool = False) -> None:
    """See to it that the model can be conditioned as the method wants; without a condition it can.

    Args:
        adapted: the model, after the method has met it.
        data: the lengths of prompts and answers.
        packing: whether rows are to be packed.

    Raises:
        UsageError: rows are to be packed; soft prompts do not fit beside prompt and answer; or the
            model does not take embeddings where tokens stood.
    """
    condition = adapted.condition
    if condition is None:
        return
    if packing:
        raise UsageError(
            "optim.packing: the method looks at each row's prompt, and packed rows are one row",
            "leave optim.packing=false; rows are then grouped by length",
        )
    if condition.width == 0:
        return
    positions = adapted.backbone.positions
    # Begin and end token count as well; what an encoder-decoder answers stands elsewhere.
    behind = 1 if adapted.backbone.encodes else data.max_answer_tokens + 2
    room = None if positions is None else positions - condition.width - behind
    if room is not None and data.max_prompt_tokens > room:
        raise UsageError(
            f"{condition.width} soft tokens before prompts of up to {data.max_prompt_tokens} do "
            f"not fit the {positions} positions of the model",
            f"e.g. --set data.max_prompt_tokens={max(1, room)}",
        )
    if not takes_embeddings(adapted):
        raise UsageError(
            f"{adapted.backbone.name} does not take soft prompts: it reads more of a token than "
            "its embedding",
            "use another method or another base",
        )


def takes_embeddings(adapted: AdaptedModel) -> bool:
    """Tell whether embedded tokens say to a model all that the tokens do; asked of the model."""
    model = adapted.backbone.model
    asked = inspect.signature(model.prepare_inputs_for_generation).parameters
    if not adapted.backbone.encodes and "inputs_embeds" not in asked:
        return False
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[1 + n % (vocabulary - 1) for n in range(8)]], device=adapted.device)
    more = {"decoder_input_ids": ids[:, :2]} if adapted.backbone.encodes else {}
    with torch.no_grad(), adapted.evaluating():
        tokens = adapted.peft(input_ids=ids, use_cache=False, **more).logits
        try:
            embedded = adapted.peft(inputs_embeds=embed(model, ids), use_cache=False, **more).logits
        except (TypeError, ValueError):
            return False
    return torch.equal(tokens, embedded)
