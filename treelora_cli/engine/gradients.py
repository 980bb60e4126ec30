"""Gradients for methods to look at: of chosen rows, at chosen weights, leaving no trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel, Snapshot
from treelora_cli.models.encode import Batch
from treelora_cli.models.forward import answer_loss


def mean_gradient(adapted: AdaptedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the gradient of the mean answer loss at the live weights.

    Without dropout, so that no random number is drawn; ``.grad`` is neither read nor written.

    Args:
        adapted: the model.
        batches: at least one.

    Returns:
        One tensor for each of ``adapted.parameters()``, of its shape.
    """
    parameters = adapted.parameters()
    total = [torch.zeros_like(parameter) for parameter in parameters]
    tokens = sum(batch.answer_tokens for batch in batches)
    was_training = adapted.peft.training
    adapted.peft.eval()
    try:
        for batch in batches:
            loss = answer_loss(adapted, batch.to(adapted.device)) / tokens
            parts = torch.autograd.grad(loss, parameters)
            total = [held + part for held, part in zip(total, parts, strict=True)]
    finally:
        adapted.peft.train(was_training)
    return total


def gradient_under(
    adapted: AdaptedModel, batches: Sequence[Batch], snapshot: Snapshot
) -> list[Tensor]:
    """Return ``mean_gradient`` at a snapshot's weights; the live weights stay as they were."""
    live = adapted.snapshot()
    adapted.restore(snapshot)
    try:
        return mean_gradient(adapted, batches)
    finally:
        adapted.restore(live)


def first_gradient(adapted: AdaptedModel, forwards: Forwards, steps: int) -> list[Tensor]:
    """Return ``mean_gradient`` of the rows of a task's first steps.

    Args:
        adapted: the model.
        forwards: the task's batches.
        steps: how many steps' rows; at most the task's own.
    """
    chosen = range(min(steps, forwards.plan.steps))
    return mean_gradient(adapted, [batch for step in chosen for batch in forwards.of(step)])
