"""Layers that are computed again in the backward pass, so that only their inputs are kept."""

from __future__ import annotations

from typing import Any

from treelora_cli.errors import UsageError


def recompute_layers(model: Any) -> None:
    """Have a model's layers computed again in every backward pass of training.

    Gradients are the same: torch restores the random state, so dropout draws the same again. The
    model does it in training mode alone; answers and gradients in evaluation mode are as ever. A
    frozen base needs nothing more, for torch's newer way of it (not ``use_reentrant``) does not ask
    that a layer's input has a gradient.

    Args:
        model: a transformers model; adapters may be on it already or come later.

    Raises:
        UsageError: the architecture does not know how.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(
            f"optim.gradient_checkpointing: {type(model).__name__} cannot compute its layers again",
            "leave it out, or lower optim.micro_batch_tokens",
        )
    # transformers 5 renamed it on the way, and warns of the older name.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    enable = renamed or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
