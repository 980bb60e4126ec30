"""EWC: weights that mattered to earlier tasks are held where these tasks left them.

Source: Kirkpatrick et al.: Overcoming catastrophic forgetting in neural networks (PNAS 2017, arXiv
1612.00796), Eq. 3; with ``online`` Schwarz et al.: Progress & Compress (ICML 2018, arXiv
1805.06370), Sec. 3.

Once a step, loss + lambda / 2 * sum over earlier tasks k and weights j of
F_kj (theta_j - theta_kj)^2: theta_k are the weights that task k left, F_k the diagonal of the
Fisher information there (see ``_fisher``), from every row's own gradient: of answers that the
model draws (``fisher: model``), or of the rows' own ones (``fisher: data``, the empirical Fisher).
F is a mean over answer tokens, as the loss is: with lambda 1 the penalty is what the earlier tasks'
losses rise by, in nats a token, to second order on the diagonal. With ``online`` there is one
anchor, the last task's weights, and F <- decay F + F_k.

Stored per task: the adapter, and the sum of all quadratics so far, which is exactly one quadratic
again (see ``_anchor``): its weights and its centre, [P] each. Cost per step: O(P), whatever the
number of tasks. When a task ends, one forward and backward pass over ``rows`` of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from treelora_cli.methods._anchor import Anchor
from treelora_cli.methods._fisher import Labels, fisher_diagonal
from treelora_cli.methods._memory import sample_rows
from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel


class EwcSettings(MethodSettings):
    """EWC's own settings."""

    strength: Annotated[float, Field(ge=0)] = Field(
        400.0, alias="lambda", description="strength of the penalty; TreeLoRA's scripts take 400"
    )
    fisher: Labels = Field(
        "model",
        description="whose answers the Fisher information is of: drawn from the model, as it is "
        "defined, or the rows' own (the empirical Fisher)",
    )
    rows: Annotated[int, Field(gt=0)] = Field(
        256, description="training rows of a finished task that it is taken of, chosen at random"
    )
    online: bool = Field(
        False, description="one anchor, the last task's weights, instead of one for every task"
    )
    decay: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="with online: what is left of the earlier tasks' weight after a task"
    )


class Ewc(Method):
    """A quadratic penalty holds the weights that mattered to earlier tasks."""

    name = "ewc"
    needs = frozenset({"penalty"})
    Settings = EwcSettings
    settings: EwcSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with nothing to hold."""
        super().start(stream, model)
        self.anchor: Anchor | None = None

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read the penalty after the last task back.

        Raises:
            RunDirError: it is missing or is not of this model.
        """
        if finished:
            last, size = finished[-1], self.model.trainable_count()
            self.anchor = Anchor.from_tensors(last.memory.tensors, size, last.name)

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the last task's weights, which are held from now on."""
        self.parameters = self.model.parameters()
        self.held = None if self.anchor is None else self.anchor.to(self.model.device)

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return lambda / 2 times the sum of the earlier tasks' quadratics."""
        if self.held is None:
            return None
        return self.settings.strength / 2 * self.held.value(parameters_to_vector(self.parameters))

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Take the Fisher information, and add the task's quadratic to those before."""
        rows = sample_rows(task.rows, self.settings.rows, task.seed)
        fisher = fisher_diagonal(self.model, task.ask, rows, self.settings.fisher, task.seed)
        with torch.no_grad():
            weights = parameters_to_vector(self.parameters).cpu()
        self.anchor = self._joined(Anchor.of(fisher, weights))
        info = {"fisher_rows": len(rows), "fisher_mean": float(fisher.mean())}
        return TaskMemory(self.anchor.tensors(), info)

    def _joined(self, new: Anchor) -> Anchor:
        if self.anchor is None:
            return new
        if self.settings.online:
            return Anchor.of(self.settings.decay * self.anchor.weight + new.weight, new.centre)
        return self.anchor.plus(new)

    departures = (
        Departure(
            "what is trained",
            "all weights",
            "all weights (TRACE, TreeLoRA)",
            "the LoRA adapter, which goes on from task to task; A and B are held apart, so what is "
            "held is not their product",
        ),
        Departure(
            "Fisher information",
            "at the task's optimum, over its rows",
            "TRACE and TreeLoRA: squares of a micro-batch's gradient, penalty included, summed "
            "over all steps of all tasks, the present one's too, and not of single rows",
            "at the task's optimum, of every row by itself, averaged over answer tokens",
        ),
        Departure(
            "anchors",
            "one for every task",
            "TRACE and TreeLoRA: the last task's weights alone, F summed",
            "one for every task; online=true for the last one's alone",
        ),
        Departure(
            "lambda",
            "chosen for each experiment",
            "400, for another scale of F",
            "400; 1 counts an earlier task's loss as the present one's",
        ),
    )
