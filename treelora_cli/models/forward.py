"""The loss of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch


def answer_loss(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the answer tokens (scalar, float32).

    The output layer is computed where answers are predicted only. Position p predicts token p + 1,
    and padded answers end in the last column: there it is the last K + 1 positions but one.
    """
    keep = batch.labels.shape[1] + 1 if batch.kept is None else batch.kept
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    accepted = forward_parameters(adapted.backbone.model)
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    logits = adapted.peft(**inputs).logits
    if isinstance(keep, int):
        logits = logits[:, -keep:-1]
    elif "logits_to_keep" not in accepted:
        logits = logits[:, keep]
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def forward_parameters(model: Any) -> frozenset[str]:
    """Return the names of what a model's forward takes."""
    return _parameters_of(type(model).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
