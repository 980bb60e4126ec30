"""LwF: on the new task's rows the model goes on saying what it said before the task.

Source: Li & Hoiem: Learning without Forgetting (ECCV 2016; TPAMI 2017, arXiv 1606.09282), Eq. 2-3,
with the distillation of Hinton et al. (2015, arXiv 1503.02531) for a language model, which has one
output layer for all tasks.

From the second task on, in every forward pass: loss + lambda T^2 KL(p_old || p_new), the mean over
the pass's answer tokens, with p = softmax(logits / T) over the vocabulary; p_old is that of the
model before the task, without dropout, p_new that of the model in training. No row of an earlier
task is kept.

Stored per task: the adapter alone. Cost per step: one more forward pass, whatever the number of
tasks, and a second copy of the adapter; the teacher's logits are computed where answers are
predicted, and kept for one pass. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    StepContext,
    TaskContext,
)
from treelora_cli.models.encode import IGNORED, Batch


class LwfSettings(MethodSettings):
    """LwF's own settings."""

    strength: Annotated[float, Field(ge=0)] = Field(
        1.0, alias="lambda", description="strength of the distillation beside the task loss"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        2.0, description="T, which the logits of both models are divided by"
    )


class Lwf(Method):
    """The model before the task teaches the one in training, on the new task's rows."""

    name = "lwf"
    needs = frozenset({"penalty"})
    per_forward = True
    Settings = LwfSettings
    settings: LwfSettings

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the last task's weights, which are the teacher's from now on."""
        self.task = task
        self.parameters = self.model.parameters()
        self.teacher = _copies(self.parameters) if task.index else []
        self.taught: Tensor | None = None

    def before_forward(self, batch: Batch) -> None:
        """Ask the teacher."""
        if self.teacher:
            with _exchanged(self.parameters, self.teacher):
                self.taught = self.task.ask.logits(batch)

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return the distillation loss of this pass."""
        if self.taught is None or step.logits is None or step.batch is None:
            return None
        taught, self.taught = self.taught, None
        found = distillation(taught, step.logits, step.batch.labels, self.settings.temperature)
        return self.settings.strength * found / step.batch.answer_tokens

    departures = (
        Departure(
            "what is trained",
            "all weights",
            "all weights (TRACE, TreeLoRA)",
            "the LoRA adapter, which goes on from task to task",
        ),
        Departure(
            "output layers",
            "one for every task; a new one is first trained alone",
            "one for all tasks (TRACE, TreeLoRA)",
            "one for all tasks: its whole vocabulary is distilled",
        ),
        Departure(
            "distillation",
            "cross-entropy of the old outputs at T = 2, which is KL(old || new) and a constant",
            "TRACE and TreeLoRA: KL(new || old) of logits at all positions, prompt and padding "
            "too; no factor",
            "lambda T^2 KL(old || new) at the answer tokens, T^2 as Hinton et al. (2015) have it",
        ),
        Departure(
            "the teacher's outputs",
            "recorded before the task",
            "TRACE and TreeLoRA: all logits of the task kept in memory, with dropout, and read by "
            "step number, though the rows' order changes from epoch to epoch",
            "computed for every batch when it is read, without dropout",
        ),
    )


def distillation(taught: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(p_taught || p), summed over answer tokens: a float32 scalar.

    Args:
        taught: [n, vocabulary], the teacher's logits.
        logits: [n, vocabulary], in the graph.
        labels: int64 [n]; positions with ``IGNORED`` only fill up and do not count.
        temperature: T.
    """
    old = functional.log_softmax(taught.float() / temperature, dim=-1)
    new = functional.log_softmax(logits.float() / temperature, dim=-1)
    apart = functional.kl_div(new, old, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * torch.where(labels == IGNORED, 0.0, apart).sum()


def _copies(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@contextmanager
def _exchanged(
    parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]
) -> Iterator[None]:
    """Give parameters other values for a while; not between a forward and its backward pass.

    Like ``Probe.at``, but the device alone is at work: that one takes its copies to the host.
    """
    live = _copies(parameters)
    _put(parameters, values)
    try:
        yield
    finally:
        _put(parameters, live)


@torch.no_grad()
def _put(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
