"""HiDe: a LoRA for every task, and the frozen base's features tell which of them answers.

Source: Wang et al., Hierarchical Decomposition of Prompt-Based Continual Learning (NeurIPS 2023,
arXiv 2310.07234) and HiDe-PET (2024, arXiv 2407.05229). Three parts: learning within a task, by an
adapter of its own; inferring a prompt's task, from statistics of what the frozen base makes of
it; and, for classifiers, a common head, which a language model has already. The inference is this
program's router (``treelora_cli.routing``: the nearest mean under the tasks' common covariance),
in every cell of the score matrix: BWT counts prompts that later tasks draw away.

``form: hide``. Every task's adapter starts from the same A and B = 0. Beside cross-entropy a
contrast is trained, weight 0.1: with M the unit vectors [mu_1; ..; mu_{t-1}; h_1; ..; h_b], where h
is the state from which a row's first answer token is predicted and mu_i the direction of the mean
of those of task i at its end,

    contrast(M) = mean over rows m of -log softmax(M M^T / 0.8)_mm,

which drives the rows from earlier tasks' means, and from one another. It needs the rows' last
states, from a hook on the output layer: no further forward pass.
Stored per task: adapter, mu_i, and the features' statistics. Cost per step: that of LoRA and the
contrast's t - 1 + b inner products squared; answering reads every prompt twice.

``form: contrastive``. What TreeLoRA's released code calls HiDe-LoRA: one adapter goes on from task
to task and answers for all, under 0.5 sum over modules of contrast(A), the rows of the live A not
brought to unit length. It knows nothing of earlier tasks. Stored per task: the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import slice_logits_to_keep

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    Mode,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch

TEMPERATURE = 0.8
MEAN = "mean"
WEIGHTS = {"hide": 0.1, "contrastive": 0.5}
ROWS = 64
"""The most rows that a task's mean state is taken over."""


class HideSettings(MethodSettings):
    """HiDe's own settings."""

    form: Literal["hide", "contrastive"] = Field(
        "hide",
        description="an adapter per task, chosen by the router for every prompt; or what the "
        "released code of TreeLoRA does: one adapter, and a contrast of the rows of A",
    )
    weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight of the contrast; by default 0.1 for hide, 0.5 for contrastive"
    )


class LastStates:
    """Keeps what an output layer was given last.

    Args:
        head: the output layer; it is watched until ``close``.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        self._given = torch.zeros(0)
        self._hook = head.register_forward_pre_hook(self._keep)

    def close(self) -> None:
        """Watch no longer."""
        self._hook.remove()

    def _keep(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._given = inputs[0]

    def of(self, batch: Batch) -> Tensor:
        """Return the unit vectors from which rows' first answer tokens were predicted, [B, H].

        Args:
            batch: was read last.

        Raises:
            UsageError: its rows are packed.
        """
        if batch.position_ids is not None:
            raise UsageError(
                "optim.packing: method.form=hide looks at each row's state, and packed rows are "
                "one row",
                "leave optim.packing=false; rows are then grouped by length",
            )
        states = self._given
        if batch.kept is not None and states.shape[:-1].numel() != len(batch.labels):
            # A model that computes its output layer everywhere.
            states = slice_logits_to_keep(states, batch.kept)
        states = states.reshape(len(batch.labels), -1)
        return functional.normalize(states[first_answers(batch)].float(), dim=1)


def first_answers(batch: Batch) -> Tensor:
    """Return where each row's first answer token stands among the labels, int64 [B]."""
    rows = len(batch.input_ids)
    if batch.kept is not None and batch.kept.dtype == torch.bool:
        counts = batch.kept.sum(1)
        return counts.cumsum(0) - counts
    each = len(batch.labels) // rows
    return torch.arange(0, rows * each, each, device=batch.labels.device)


def contrast(rows: Tensor) -> Tensor:
    """Return how hard rows [n, H] are to tell apart: the mean of -log softmax(M M^T / 0.8)_mm."""
    similarity = rows @ rows.T / TEMPERATURE
    return functional.cross_entropy(similarity, torch.arange(len(rows), device=rows.device))


class Hide(Method):
    """A LoRA per task, each prompt sent to the task it looks like (HiDe-LoRA)."""

    name = "hide"
    needs = frozenset({"penalty"})
    mode: Mode = "route"
    per_forward = True
    Settings = HideSettings
    settings: HideSettings
    departures = (
        Departure(
            "task inference",
            "a classifier over all classes, trained on Gaussians of the base's features",
            "HiDe: as in the paper; TreeLoRA: none, one adapter answers all",
            "the nearest task's mean under a common covariance, from its training prompts",
        ),
        Departure(
            "contrast",
            "mean log-probability of matching an old class's mean, unbounded below",
            "HiDe: cross-entropy of M M^T / 0.8, M old means and the batch's features; TreeLoRA: "
            "the same of the rows of the live A",
            "form=hide: HiDe's, of unit vectors, one mean a task; form=contrastive: TreeLoRA's",
        ),
        Departure(
            "common head",
            "re-balanced on features drawn from the Gaussians",
            "HiDe: as in the paper; TreeLoRA: none",
            "none: the base answers in text",
        ),
        Departure(
            "an adapter's start",
            "from what earlier tasks learned",
            "HiDe: with a momentum over tasks; TreeLoRA: the task before",
            "form=hide: the same A for all, B = 0; form=contrastive: the task before",
        ),
    )

    def __init__(self, settings: HideSettings) -> None:
        super().__init__(settings)
        self.mode = "route" if settings.form == "hide" else "latest"

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Meet the model.

        Raises:
            UsageError: it has no output layer to look at.
        """
        super().start(stream, model)
        self.means: list[Tensor] = []
        self.states: LastStates | None = None
        self.head = model.backbone.model.get_output_embeddings()
        chosen = self.settings.weight
        self.weight = WEIGHTS[self.settings.form] if chosen is None else chosen
        if self.mode == "route" and self.head is None:
            raise UsageError(
                f"method.form=hide: {model.backbone.name} has no output layer to look at",
                "use method.form=contrastive, or another method",
            )

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read earlier tasks' means."""
        if self.mode == "route":
            self.means = [task.memory.tensors[MEAN].to(self.model.device) for task in finished]

    def begin_task(self, task: TaskContext) -> None:
        """Start anew and watch the output layer, or go on."""
        if self.mode == "route":
            self.model.reset()
            self.states = LastStates(self.head)

    def penalty(self, step: StepContext) -> Tensor:
        """Return the contrast, of the rows that were just read or of A."""
        if self.states is None:
            found = [contrast(A.float()) for _, A in self.model.named_factors("A")]
            return self.weight * torch.stack(found).sum()
        if step.batch is None:
            raise RuntimeError("the contrast is taken of a batch")
        return self.weight * contrast(torch.stack([*self.means, *self.states.of(step.batch)]))

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Keep the mean state of some of the task's rows, evenly spaced."""
        if self.states is None:
            return TaskMemory()
        size = min(ROWS, len(task.rows))
        rows = [task.rows[number * len(task.rows) // size] for number in range(size)]
        found = []
        for batch in task.ask.batches(rows):
            task.ask.logits(batch)
            found.append(self.states.of(batch))
        self.states.close()
        self.means.append(functional.normalize(torch.cat(found).mean(0), dim=0))
        return TaskMemory({MEAN: self.means[-1].cpu()})
