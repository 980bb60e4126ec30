"""The gradient of a task's first rows, before anything of it is trained."""

from __future__ import annotations

from torch import Tensor

from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.probe import mean_gradient
from treelora_cli.models.spread import ALL, Spread


def first_gradient(
    adapted: AdaptedModel, forwards: Forwards, steps: int, spread: Spread = ALL
) -> list[Tensor]:
    """Return ``mean_gradient`` of the rows of a task's first steps.

    Args:
        adapted: the model.
        forwards: the task's batches.
        steps: how many steps' rows; at most the task's own.
        spread: how several processes share the work.
    """
    chosen = range(min(steps, forwards.plan.steps))
    batches = [batch for step in chosen for batch in forwards.of(step)]
    tokens = sum(batch.answer_tokens for batch in batches)
    return mean_gradient(adapted, spread.mine(batches), tokens, spread)
