"""The gradient of a task's first rows, before anything of it is trained."""

from __future__ import annotations

from torch import Tensor

from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.probe import mean_gradient


def first_gradient(adapted: AdaptedModel, forwards: Forwards, steps: int) -> list[Tensor]:
    """Return ``mean_gradient`` of the rows of a task's first steps.

    Args:
        adapted: the model.
        forwards: the task's batches.
        steps: how many steps' rows; at most the task's own.
    """
    chosen = range(min(steps, forwards.plan.steps))
    return mean_gradient(adapted, [batch for step in chosen for batch in forwards.of(step)])
