"""OGD: gradients are made orthogonal to the directions that would change earlier tasks' answers.

Source: Farajtabar, Azizan, Mott, Li: Orthogonal Gradient Descent for Continual Learning (AISTATS
2020, arXiv 1910.07104), Algorithm 1 in the variant OGD-GTL (ground-truth logit), on the parameters
of LoRA. ``treelora methods ogd`` shows what the released TreeLoRA and TRACE code does instead.

When a task has ended, some of its rows are read once more at the final weights w. A row's direction
is the gradient of f(w) = mean over its answer tokens of the logit of that token (the logit, not the
loss: the loss of a learned row has next to no gradient). What earlier directions do not span of it,
normalised, joins the rows of V. From then on, with g the gradient of a step's loss:

    g <- g - V' V g

The adapter goes on from task to task. Stored per task: its rows of V, float32 [at most
``directions``, trainable parameters] (a 7B model with rank 8 on query and value: 17 MB a
direction). Cost per step: 4 K P multiplications for K directions in all, so it grows with the
tasks, as the memory does; per task ``directions`` forward and backward passes of one row.

The guarantee is for a step along g. AdamW divides every entry by its own scale, which turns the
step back into the spanned space; ``project=step`` therefore takes V' V off the step itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from treelora_cli.errors import RunDirError
from treelora_cli.methods._episodic import gradients
from treelora_cli.methods._memory import sample_rows
from treelora_cli.methods.base import (
    EFFECT,
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
from treelora_cli.models.encode import IGNORED, Batch
from treelora_cli.models.forward import answer_logits
from treelora_cli.models.readback import Readback

DIRECTIONS = "directions"
# A direction of which earlier ones leave less than this is spanned by them, but for rounding.
_SPANNED = 1e-3


class OgdSettings(MethodSettings):
    """OGD's own settings."""

    directions: Annotated[int, Field(gt=0)] = Field(
        100, description="most directions stored a task, one for each of as many training rows"
    )
    project: Literal["gradient", "step"] = Field(
        "gradient",
        description="what is made orthogonal: the gradient, as in the paper; or what the optimizer "
        "makes of it",
    )


class Ogd(Method):
    """One LoRA adapter whose gradients avoid what earlier tasks' answers depend on."""

    name = "ogd"
    needs = frozenset({"gradients"})
    Settings = OgdSettings
    settings: OgdSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with no directions."""
        super().start(stream, model)
        self.parameters = model.parameters()
        entries = sum(parameter.numel() for parameter in self.parameters)
        self.basis = torch.zeros(0, entries, device=model.device)
        self.before = torch.zeros(0)
        self.effect: dict[str, Any] = {}

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read all tasks' directions.

        Raises:
            RunDirError: a task's are missing or not of this model.
        """
        for task in finished:
            found = task.memory.tensors.get(DIRECTIONS)
            if found is None or found.dim() != 2 or found.shape[1] != self.basis.shape[1]:
                raise RunDirError(
                    f"task {task.name} was stored without directions of this adapter",
                    "put its method.safetensors back from a copy, or start a new run",
                )
            self.basis = torch.cat([self.basis, found.to(self.basis.device)])

    def after_backward(self, step: StepContext) -> None:
        """Take off the gradient what the stored directions span."""
        if not len(self.basis):
            return
        if self.settings.project == "step":
            self.before = self._weights()
            return
        found = gradients(self.parameters)
        spanned = self._spanned(parameters_to_vector(found))
        for parameter, gradient, part in zip(
            self.parameters, found, self._pieces(spanned), strict=True
        ):
            parameter.grad = gradient - part

    def _spanned(self, vector: Tensor) -> Tensor:
        """Return the part of a vector [P] that the directions span; its norm is the effect."""
        spanned = self.basis.T @ (self.basis @ vector)
        self.effect = {EFFECT: Readback(spanned.norm())}
        return spanned

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report the norm of what was taken off; with ``project=step``, take it off here."""
        if not len(self.basis):
            return {}
        if self.settings.project == "step":
            spanned = self._spanned(self._weights() - self.before)
            with torch.no_grad():
                for parameter, part in zip(self.parameters, self._pieces(spanned), strict=True):
                    parameter.sub_(part)
        return self.effect

    def _weights(self) -> Tensor:
        return parameters_to_vector(self.parameters).detach()

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector [P] into the parameters' shapes."""
        parts = torch.split(vector, [parameter.numel() for parameter in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Add the directions of some of the task's rows at the final weights."""
        rows = sample_rows(task.rows, self.settings.directions, task.seed)
        known = count = len(self.basis)
        grown = self.basis.new_empty(known + len(rows), self.basis.shape[1])
        grown[:known] = self.basis
        for row in rows:
            found = new_direction(grown[:count], self._logit_gradient(task.ask.batches([row])))
            if found is not None:
                grown[count] = found
                count += 1
        self.basis = grown[:count]
        added = self.basis[known:].cpu()
        return TaskMemory({DIRECTIONS: added}, {"directions": len(added)})

    def _logit_gradient(self, batches: Sequence[Batch]) -> Tensor:
        """Return the gradient of the mean logit of the answer tokens, [P], without dropout."""
        with self.model.evaluating():
            logits = torch.cat([answer_logits(self.model, batch) for batch in batches]).float()
        labels = torch.cat([batch.labels for batch in batches])
        real = labels != IGNORED
        truth = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        mean = (truth * real).sum() / real.sum()
        return parameters_to_vector(
            torch.autograd.grad(mean, self.parameters, allow_unused=True, materialize_grads=True)
        )

    departures = (
        Departure(
            "what is projected",
            "the gradient, followed by SGD",
            "the gradient of each parameter, in a hook; then Adam (TRACE, TreeLoRA)",
            "the gradient, then AdamW; method.project=step projects what AdamW makes of it",
        ),
        Departure(
            "directions",
            "gradients of the logits; OGD-GTL: of the true class's",
            "gradients of the loss, of the last epoch's batches, as projected before",
            "gradients of the answer tokens' mean logit, a row at a time, after the task",
        ),
        Departure(
            "how many",
            "200 a task (MNIST)",
            "one for every batch; max_memories=150 is never read",
            "100 a task: LoRA on a language model has many more parameters",
        ),
        Departure(
            "what is stored",
            "different rows' gradients",
            "one tensor, appended again and again: all columns are the last batch's gradient, and "
            "normalising their differences makes unit vectors of rounding noise in bfloat16",
            "a copy each",
        ),
        Departure(
            "projection",
            "on the whole parameter vector",
            "parameter by parameter with slices of the whole basis, which are not orthonormal",
            "as in the paper",
        ),
        Departure(
            "orthonormal",
            "Gram-Schmidt",
            "Gram-Schmidt once, in bfloat16, over all tasks' columns after every task",
            "Gram-Schmidt twice, in float32, of the new ones; what is spanned already is left out",
        ),
        Departure(
            "parameters",
            "all",
            "those of LoRA",
            "those of LoRA",
        ),
    )


def new_direction(basis: Tensor, vector: Tensor) -> Tensor | None:
    """Return what orthonormal rows do not span of a vector, as a unit vector.

    Args:
        basis: orthonormal rows, float32 [K, P].
        vector: float32 [P].

    Returns:
        [P], or None where the vector is zero or spanned.
    """
    rest = vector
    for _ in range(2):  # once leaves what rounding made of a large spanned part
        rest = rest - basis.T @ (basis @ rest)
    if rest.norm() <= _SPANNED * vector.norm():
        return None
    return rest.div(rest.norm())
