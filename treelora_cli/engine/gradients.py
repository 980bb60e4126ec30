"""Gradients for methods to look at: of chosen rows, at chosen weights, leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from treelora_cli.engine.batches import RowPlan
from treelora_cli.models.adapted import AdaptedModel, Snapshot
from treelora_cli.models.encode import Batch, Example, collate
from treelora_cli.models.forward import answer_loss


def step_batches(
    examples: Sequence[Example], plan: RowPlan, step: int, size: int, pad: int
) -> Iterator[Batch]:
    """Yield the micro-batches of an optimizer step.

    Args:
        examples: the training rows.
        plan: which rows each step sees.
        step: from 0.
        size: rows a micro-batch.
        pad: the padding token's id.
    """
    rows = plan.rows(step)
    for start in range(0, len(rows), size):
        yield collate([examples[row] for row in rows[start : start + size]], pad)


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


def first_gradient(
    adapted: AdaptedModel, examples: Sequence[Example], plan: RowPlan, size: int, steps: int
) -> list[Tensor]:
    """Return ``mean_gradient`` of the rows of a task's first steps.

    Args:
        adapted: the model.
        examples: the training rows.
        plan: which rows each step sees.
        size: rows a micro-batch.
        steps: how many steps' rows; at most the task's own.
    """
    pad = adapted.backbone.tokenizer.pad_token_id
    chosen = range(min(steps, plan.steps))
    batches = [batch for step in chosen for batch in step_batches(examples, plan, step, size, pad)]
    return mean_gradient(adapted, batches)
