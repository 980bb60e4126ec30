"""The loss of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import slice_logits_to_keep

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch


def answer_loss(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the answer tokens (scalar, float32).

    The output layer is computed where answers are predicted only.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    accepted = forward_parameters(adapted.backbone.model)
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = batch.kept
    logits = adapted.peft(**inputs).logits
    if "logits_to_keep" not in accepted:
        logits = slice_logits_to_keep(logits, batch.kept)
    return functional.cross_entropy(
        logits.float().view(len(batch.labels), -1),
        batch.labels,
        ignore_index=IGNORED,
        reduction="sum",
    )


def forward_parameters(model: Any) -> frozenset[str]:
    """Return the names of what a model's forward takes."""
    return _parameters_of(type(model).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
