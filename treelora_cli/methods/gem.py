"""GEM: no update may raise, to first order, the loss on rows kept of any earlier task.

Source: Lopez-Paz & Ranzato: Gradient Episodic Memory for Continual Learning (NeurIPS 2017, arXiv
1706.08840), Eq. 8-11, and its released code.

With g the gradient of a step over all trainable parameters as one vector, and g_k that of the mean
loss on rows kept of earlier task k, the rows of G: if some <g, g_k> is negative, g becomes
g + G^T v, where v minimises |g + G^T v|^2 / 2 over v >= margin. Then <g + G^T v, g_k> >= 0 for
every k. With margin 0 it is the nearest such vector; a positive one leans further toward earlier
tasks. The program has one unknown a task and is solved exactly, in float64 (see ``_cone``).

Stored per task: the adapter and ``rows`` tokenised rows. Cost per step with N earlier tasks: N
forward and backward passes over ``drawn`` rows, N gradients in memory, and one short wait for the
device, because the program is solved on the host.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from treelora_cli.errors import DivergedError
from treelora_cli.methods._cone import cone_weights
from treelora_cli.methods._episodic import (
    Drawn,
    Episodic,
    EpisodicSettings,
    gradients,
    gram_matrix,
    most,
)
from treelora_cli.methods._memory import draw
from treelora_cli.methods.base import Departure, StepContext
from treelora_cli.models.encode import Example


class GemSettings(EpisodicSettings):
    """GEM's own settings."""

    drawn: Drawn = Field(
        16,
        description="rows of every earlier task that are read at each step, drawn anew; all: the "
        "whole memory, as in the paper",
    )
    margin: float = Field(
        0.5, ge=0, description="gamma: least share of every memory's gradient that is added"
    )


class Gem(Episodic):
    """Gradients are projected so that no earlier task's stored rows get worse."""

    name = "gem"
    Settings = GemSettings
    settings: GemSettings

    def after_backward(self, step: StepContext) -> None:
        """Project the step's gradient.

        Raises:
            DivergedError: a gradient is not finite.
        """
        if not self.memories:
            return
        parameters = self.model.parameters()
        live = gradients(parameters)
        past = [self.task.ask.gradient(self._drawn(number, step)) for number in self._numbers]
        gram = gram_matrix([live, *past]).cpu().numpy()
        if not np.isfinite(gram).all():
            raise DivergedError(
                f"task {self.task.name}: a gradient is not finite at step {step.step + 1}",
                "lower optim.lr, raise optim.warmup_steps or set optim.grad_clip",
            )
        weights = cone_weights(gram, self.settings.margin)
        for parameter, *parts in zip(parameters, live, *past, strict=True):
            grad = parts[0].clone()
            for weight, part in zip(weights.tolist(), parts[1:], strict=True):
                grad.add_(part, alpha=weight)
            parameter.grad = grad
        taken = float(np.sqrt(max(0.0, weights @ gram[1:, 1:] @ weights)))
        self.observe(taken, conflicts=int((gram[0, 1:] < 0).sum()))

    @property
    def _numbers(self) -> range:
        return range(len(self.memories))

    def _drawn(self, number: int, step: StepContext) -> list[Example]:
        """Return this step's rows of an earlier task."""
        rows = self.memories[number].rows
        count = most(self.settings.drawn, len(rows))
        return draw(rows, count, self.task.seed + number, step.step)

    departures = (
        Departure(
            "what is trained",
            "all weights",
            "all weights (GEM's own code, TRACE and TreeLoRA)",
            "the LoRA adapter, which goes on from task to task",
        ),
        Departure(
            "memory gradient",
            "of all rows kept, at every step, at the present weights",
            "GEM's own code: as the paper; TRACE and TreeLoRA: no rows are kept, but one gradient "
            "of the last micro-batch of each task, which is never computed again",
            "at the present weights, of drawn rows, without dropout; drawn=all for all of them",
        ),
        Departure(
            "program",
            "v >= 0, then the margin is added to v",
            "GEM's own code: v >= margin; TRACE and TreeLoRA: a wrong sign and v <= margin, which "
            "doubles a conflict, and for every tensor by itself",
            "v >= margin, over all parameters at once",
        ),
        Departure(
            "optimizer",
            "SGD",
            "GEM's own code: SGD; TRACE and TreeLoRA: Adam",
            "that of the recipe: AdamW rescales what was projected, so that the bound holds for "
            "the gradient it is given, not for its step",
        ),
        Departure(
            "which rows are kept",
            "the last ones of a task",
            "the last ones (GEM's own code)",
            "chosen at random from all of the task's rows",
        ),
    )
