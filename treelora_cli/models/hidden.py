"""The hidden states that the output layer makes logits of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch
from treelora_cli.models.forward import answer_logits


def require_output_layer(adapted: AdaptedModel) -> None:
    """See to it that a model says which its output layer is.

    Raises:
        UsageError: it does not.
    """
    if adapted.backbone.model.get_output_embeddings() is None:
        raise UsageError(
            f"{adapted.backbone.name} does not say what its output layer reads",
            "let the method compare logits, not hidden states",
        )


def answer_hidden(adapted: AdaptedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what the output layer reads where answers are predicted, and what it makes of it.

    Args:
        adapted: the model; in its present mode, in the graph.
        batch: on its device.

    Returns:
        Hidden states [n, hidden] and logits [n, vocabulary], in the order of ``batch.labels``.
    """
    read: list[Tensor] = []

    def see(layer: Any, given: tuple[Tensor, ...]) -> None:
        read.append(given[0])

    handle = adapted.backbone.model.get_output_embeddings().register_forward_pre_hook(see)
    try:
        logits = answer_logits(adapted, batch)
    finally:
        handle.remove()
    hidden = read[-1]
    if batch.kept is not None and hidden.shape[:-1].numel() != len(batch.labels):
        # A model that computes the logits of all positions.
        hidden = slice_logits_to_keep(hidden, batch.kept)
    return hidden.reshape(len(batch.labels), -1), logits
