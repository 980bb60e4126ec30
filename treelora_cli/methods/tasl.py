"""TaSL: after each task every LoRA matrix is kept, taken over or mixed, as its importance says.

Source: Feng et al.: TaSL, Continual Dialog State Tracking via Task Skill Localization and
Consolidation (ACL 2024, arXiv 2408.09857), and the released code (WoodScene/TaSL); its "skill
units" are the single LoRA matrices A and B. The adapter goes on from the last consolidated one.
Per optimizer step, for every entry w with gradient g of the step's loss:

    I = |w g|    S <- a1 S + (1 - a1) I    U <- a2 U + (1 - a2) |I - S|

At the task's end a matrix's importance is the mean of S U over its entries, brought to [0, 1] by
the least and the largest (n). The importance for all earlier tasks (p) is p <- n at the first task,
then b p + (1 - b) n, brought to [0, 1] again. A matrix is important if it is above the quantile
that leaves the share ``important`` of all matrices. With W_p as consolidated before and W_n as
trained:

    both: k W_p + (1 - k) W_n    earlier only: W_p    new only: W_n    neither: (W_p + W_n) / 2

Stored per task: the consolidated adapter, and p, one number a matrix. Cost per step: some passes
over vectors as long as the adapter, whatever the number of tasks.

A and B are consolidated apart, as released: where one is kept and the other taken over, their
product is that of neither task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from treelora_cli.errors import RunDirError
from treelora_cli.methods._episodic import gradients
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

IMPORTANCE = "importance"
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TaslSettings(MethodSettings):
    """TaSL's own settings."""

    sensitivity_decay: Decay = Field(
        0.85, description="a1: share of the smoothed importance that stays at every step"
    )
    uncertainty_decay: Decay = Field(
        0.85, description="a2: share of the smoothed uncertainty that stays at every step"
    )
    important: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the LoRA matrices that counts as important"
    )
    memory: Share = Field(
        0.7, description="b: weight of earlier tasks in the importance they all have together"
    )
    keep: Share = Field(
        0.7, description="k: weight of the earlier values where a matrix is important to both"
    )


class Tasl(Method):
    """One LoRA adapter, mixed with its earlier self after each task, matrix by matrix."""

    name = "tasl"
    needs = frozenset({"gradients"})
    Settings = TaslSettings
    settings: TaslSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with nothing known of any matrix."""
        super().start(stream, model)
        self.parameters = model.parameters()
        self.importance: Tensor | None = None

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read how important every matrix is to the tasks so far.

        Raises:
            RunDirError: it is missing or not of this model.
        """
        if not finished:
            return
        found = finished[-1].memory.tensors.get(IMPORTANCE)
        if found is None or found.shape != (len(self.parameters),):
            raise RunDirError(
                f"task {finished[-1].name} was stored without the importance of this adapter's "
                "matrices",
                "put its method.safetensors back from a copy, or start a new run",
            )
        self.importance = found

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the consolidated adapter; the importance is measured anew."""
        self.task = task
        self.before = self.model.snapshot()
        self.sensitivity = torch.zeros(self.model.trainable_count(), device=self.model.device)
        self.uncertainty = torch.zeros_like(self.sensitivity)
        self.info: dict[str, Any] = {}

    def after_backward(self, step: StepContext) -> None:
        """Follow |w g| and how much it varies."""
        with torch.no_grad():
            weights = parameters_to_vector(self.parameters)
            now = (weights * parameters_to_vector(gradients(self.parameters))).abs()
        self.sensitivity.lerp_(now, 1 - self.settings.sensitivity_decay)
        apart = (now - self.sensitivity).abs()
        self.uncertainty.lerp_(apart, 1 - self.settings.uncertainty_decay)

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Consolidate with the last step; report the norm of what that took back."""
        if step.step + 1 < self.task.steps:
            return {}
        new = self._measured()
        if self.importance is None:
            self.importance = new
            return {}
        return {EFFECT: self._consolidate(self.importance, new)}

    def _measured(self) -> Tensor:
        """Return every matrix's importance to this task, on the host [matrices], in [0, 1]."""
        scores = self.sensitivity * self.uncertainty
        parts = torch.split(scores, [parameter.numel() for parameter in self.parameters])
        return normalised(torch.stack([part.mean() for part in parts]).cpu())

    def _consolidate(self, earlier: Tensor, new: Tensor) -> float:
        """Mix the adapter with what it was before the task; return the norm of the difference."""
        settings = self.settings
        trained = self.model.snapshot()
        shares = shares_of_earlier(
            marked(earlier, settings.important), marked(new, settings.important), settings.keep
        )
        mixed = dict(trained)
        for key, share in zip(self.model.trainable(), shares.tolist(), strict=True):
            mixed[key] = torch.lerp(trained[key], self.before[key], share)
        self.model.restore(mixed)
        self.importance = normalised(settings.memory * earlier + (1 - settings.memory) * new)
        self.info = {"kept": int((shares == 1).sum()), "replaced": int((shares == 0).sum())}
        return math.sqrt(sum(float((trained[k] - mixed[k]).square().sum()) for k in mixed))

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Keep the importance of every matrix to all tasks so far."""
        if self.importance is None:
            raise RuntimeError("a task ended without a step")
        return TaskMemory({IMPORTANCE: self.importance}, self.info)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the two running means."""
        tensors = {"sensitivity": self.sensitivity.cpu(), "uncertainty": self.uncertainty.cpu()}
        return tensors, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.sensitivity = tensors["sensitivity"].to(self.model.device)
        self.uncertainty = tensors["uncertainty"].to(self.model.device)

    departures = (
        Departure(
            "gradient",
            "of the loss, at the weights it was taken at",
            "after clipping, with the weights that the step has made of them; the first step is "
            "left out",
            "before clipping, with the weights it was taken at, of every step",
        ),
        Departure(
            "smoothing",
            "weights not said for the backbones apart",
            "0.85 and 0.85, without warm-up; the copy in the TreeLoRA repository, which nothing "
            "calls, waits for 50 steps or a twentieth of them",
            "0.85 and 0.85, without warm-up",
        ),
        Departure(
            "who is consolidated",
            "the adapter after the task",
            "the checkpoint with the best validation loss of the task",
            "the adapter after the task's last step",
        ),
        Departure(
            "skill units",
            "the LoRA matrices A and B; in the later version (arXiv 2408.05200) groups of them",
            "A and B apart",
            "A and B apart",
        ),
        Departure(
            "optimizer",
            "not said",
            "a new AdamW per task, 50 steps of warm-up",
            "a new AdamW per task; optim.warmup_steps",
        ),
    )


def normalised(scores: Tensor) -> Tensor:
    """Bring scores to [0, 1] by the least and the largest; zero where all are equal."""
    low, high = scores.min(), scores.max()
    return torch.where(high > low, (scores - low) / (high - low), 0.0)


def marked(scores: Tensor, share: float) -> Tensor:
    """Tell which scores are above the quantile that leaves a share of them above it, bool [n]."""
    return scores > scores.quantile(1 - share)


def shares_of_earlier(earlier: Tensor, new: Tensor, keep: float) -> Tensor:
    """Return the weight of the earlier values in every consolidated matrix, float32 [n].

    Args:
        earlier: which matrices are important to the tasks before, bool [n].
        new: which are to the new one, bool [n].
        keep: the weight where both are.
    """
    shares = torch.full(earlier.shape, 0.5)
    shares[earlier & new] = keep
    shares[earlier & ~new] = 1.0
    shares[new & ~earlier] = 0.0
    return shares
