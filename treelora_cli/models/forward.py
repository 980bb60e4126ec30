"""The loss of a batch, and the logits it is taken of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import slice_logits_to_keep

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch
from treelora_cli.models.kind import decoder_start
from treelora_cli.models.soft import Reading, at_the_start


def answer_loss(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the answer tokens (scalar, float32)."""
    return answer_loss_of(answer_logits(adapted, batch), batch)


def answer_logits(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the logits where answers are predicted, [n, vocabulary], in the labels' order.

    The output layer is computed there only. The model's condition, if there is one, sees the
    prompts first; soft prompts that it gives are read before the embedded tokens, and gradients
    flow into them.

    Raises:
        UsageError: the rows are packed and there is a condition.
        ValueError: the batch was made for the other kind of model.
    """
    if adapted.backbone.encodes != (batch.kept is None):
        raise ValueError("a batch for an encoder-decoder, or a model that is one, but not both")
    soft = _look(adapted, batch)
    logits = (
        _causal_logits(adapted, batch, batch.kept, soft)
        if batch.kept is not None
        else _decoder_logits(adapted, batch, soft)
    )
    found: Tensor = logits.reshape(len(batch.labels), -1)
    return found


def answer_loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of ``answer_logits`` (scalar, float32)."""
    return functional.cross_entropy(
        logits.float(), batch.labels, ignore_index=IGNORED, reduction="sum"
    )


def _look(adapted: AdaptedModel, batch: Batch) -> Tensor | None:
    """Show the condition a batch's prompts; return the soft prompts that it gives."""
    if adapted.condition is None:
        return None
    if batch.starts is None:
        raise UsageError(
            "optim.packing: the method looks at each row's prompt, and packed rows are one row",
            "leave optim.packing=false; rows are then grouped by length",
        )
    return adapted.condition.read(batch.input_ids, batch.prompt_mask())


def _causal_logits(
    adapted: AdaptedModel, batch: Batch, kept: Tensor, soft: Tensor | None
) -> Tensor:
    model = adapted.backbone.model
    accepted = forward_parameters(model)
    inputs: dict[str, Any] = {"use_cache": False}
    if soft is None:
        inputs["input_ids"] = batch.input_ids
    else:
        inputs |= at_the_start(model, soft, Reading(batch.input_ids, None))
        kept = _moved(kept, soft.shape[1])
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    logits: Tensor = adapted.peft(**inputs).logits
    return logits if "logits_to_keep" in accepted else slice_logits_to_keep(logits, kept)


def _moved(kept: Tensor, width: int) -> Tensor:
    """Return the kept positions of a batch, int64 or bool, behind so many more tokens."""
    return functional.pad(kept, (width, 0)) if kept.dtype == torch.bool else kept + width


def _decoder_logits(adapted: AdaptedModel, batch: Batch, soft: Tensor | None) -> Tensor:
    model = adapted.backbone.model
    # All rows of one length need no mask, and asking a mask about it makes the host wait.
    padded = batch.tokens - batch.answer_tokens < batch.input_ids.numel()
    reading = Reading(batch.input_ids, batch.prompt_mask() if padded else None)
    labels = batch.labels.view(len(batch.input_ids), -1)
    logits: Tensor = adapted.peft(
        **(reading.inputs() if soft is None else at_the_start(model, soft, reading)),
        decoder_input_ids=shifted_right(model, labels),
        use_cache=False,
    ).logits
    return logits


def shifted_right(model: Any, labels: Tensor) -> Tensor:
    """Return what a decoder reads to predict labels: its start token, then all but the last.

    Args:
        model: an encoder-decoder.
        labels: int64 [B, A]; where they only fill up, any token may stand.
    """
    start = labels.new_full((len(labels), 1), decoder_start(model.config) or 0)
    return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)


def forward_parameters(model: Any) -> frozenset[str]:
    """Return the names of what a model's forward takes."""
    return _parameters_of(type(model).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
