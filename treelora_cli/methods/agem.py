"""A-GEM: no update may raise, to first order, the mean loss on rows kept of all earlier tasks.

Source: Chaudhry, Ranzato, Rohrbach, Elhoseiny: Efficient Lifelong Learning with A-GEM (ICLR 2019,
arXiv 1812.00420), Eq. 11.

With g the gradient of a step over all trainable parameters as one vector, and r that of the mean
loss on rows drawn from those kept of all earlier tasks: if <g, r> is negative, g becomes
g - (<g, r> / <r, r>) r, the nearest vector that is orthogonal to r.

Stored per task: the adapter and ``rows`` tokenised rows. Cost per step: one forward and backward
pass over ``drawn`` rows, whatever the number of tasks. No step waits for the device.
"""

from __future__ import annotations

import torch
from pydantic import Field

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


class AgemSettings(EpisodicSettings):
    """A-GEM's own settings."""

    drawn: Drawn = Field(
        32,
        description="rows of all earlier tasks together that are read at each step, drawn anew; "
        "all: the whole memory",
    )


class Agem(Episodic):
    """Gradients are made orthogonal to that of stored rows, where they would make them worse."""

    name = "agem"
    Settings = AgemSettings
    settings: AgemSettings

    def after_backward(self, step: StepContext) -> None:
        """Project the step's gradient."""
        kept = [row for memory in self.memories for row in memory.rows]
        if not kept:
            return
        rows = draw(kept, most(self.settings.drawn, len(kept)), self.task.seed, step.step)
        parameters = self.model.parameters()
        live = gradients(parameters)
        reference = self.task.ask.gradient(rows)
        gram = gram_matrix([live, reference])
        conflict = gram[0, 1] < 0
        share = torch.where(conflict, -gram[0, 1] / gram[1, 1], 0.0)
        for parameter, grad, part in zip(parameters, live, reference, strict=True):
            parameter.grad = grad + share.to(part.dtype) * part
        self.observe(share * gram[1, 1].sqrt())

    departures = (
        Departure(
            "what is trained",
            "all weights",
            "all weights",
            "the LoRA adapter, which goes on from task to task",
        ),
        Departure(
            "rows read at a step",
            "a random batch of the memory",
            "256 rows (permuted MNIST)",
            "drawn=32; without dropout",
        ),
        Departure(
            "optimizer",
            "SGD",
            "SGD",
            "that of the recipe: AdamW rescales what was projected, so that the bound holds for "
            "the gradient it is given, not for its step",
        ),
    )
