"""OSF: weights trained in the smallest singular directions alone, the largest preserved.

Source: Nayak et al.: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual
Learning (2025, arXiv 2504.07097), as PEFT ships it (``peft.OSFConfig``; Red Hat's OSFT). Before
every task each adapted matrix is decomposed, W = U_h S_h V_h' + U_l S_l V_l', by the size of its
singular values; U_l, S_l and V_l are trained on the mean cross-entropy of the answer tokens, with
gradients (and here also the factors, see ``hold``) kept orthogonal to U_h and V_h; afterwards W is
put together again. The share that is preserved grows with the tasks, as PEFT's guide advises:
(i - 1) / n before task i of n. The latest weights answer.

Stored per task: the adapted weights, whole; no adapter. Cost per task: one singular value
decomposition of every adapted matrix, O(d_out d_in min(d_out, d_in)), and while it is trained up to
two times the entries of W with gradient and moments; neither grows with the number of tasks.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import (
    EFFECT,
    Departure,
    Method,
    MethodSettings,
    StepContext,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import Backbone
from treelora_cli.models.osf import OsfModel
from treelora_cli.models.readback import Readback
from treelora_cli.recipe import LoraSection

Share = Annotated[float, Field(ge=0, lt=1)]


class OsfSettings(MethodSettings):
    """OSF's own settings; which modules are adapted is ``lora.targets``."""

    tasks: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="tasks n that capacity is shared among: before task i the share (i-1)/n is "
        "preserved, from task n on (n-1)/n; nothing: (i-1)/i, as if every task were the last",
    )
    preserved: tuple[Share, ...] = Field(
        (), description="the share preserved before each task instead; the last one goes on"
    )
    hold: Literal["gradients", "weights"] = Field(
        "weights",
        description="gradients are kept off the preserved directions (PEFT), and after every step "
        "the factors too (as the authors' own trainer does), since AdamW's steps leave them",
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description="by what optim.lr is multiplied: whole weights take smaller steps",
    )

    @model_validator(mode="after")
    def _one_schedule(self) -> OsfSettings:
        if self.tasks is not None and self.preserved:
            raise ValueError("tasks and preserved both say what is preserved: give one of them")
        return self

    def share(self, index: int) -> float:
        """Return the share of singular directions preserved before a task, from 0."""
        if self.preserved:
            return self.preserved[min(index, len(self.preserved) - 1)]
        tasks = index + 1 if self.tasks is None else self.tasks
        return min(index, tasks - 1) / tasks


class Osf(Method):
    """PEFT's orthogonal subspace fine-tuning, task after task."""

    name = "osf"
    needs = frozenset({"gradients", "weights"})
    answer = "more"
    Settings = OsfSettings
    settings: OsfSettings
    model: OsfModel

    @classmethod
    def build(cls, backbone: Backbone, lora: LoraSection, seed: int) -> AdaptedModel:
        """Return the backbone, ready to be decomposed.

        Raises:
            UsageError: nothing in it can be.
        """
        return OsfModel(backbone, lora)

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Meet the model.

        Raises:
            UsageError: it carries a LoRA adapter.
        """
        super().start(stream, model)
        if not isinstance(model, OsfModel):
            raise UsageError(
                "osf trains whole weights and brings a model of its own; this one carries LoRA",
                "compare it with train-stream",
            )

    def learns(self, key: str) -> bool:
        """Tell of nothing: neither LoRA nor base weights as they are, but factors of the latter."""
        return False

    def rate(self, key: str) -> float:
        """Return the method's learning rate as a part of the recipe's."""
        return self.settings.rate

    def begin_task(self, task: TaskContext) -> None:
        """Decompose the weights as the last task left them."""
        self.share = self.settings.share(task.index)
        began = time.perf_counter()
        self.model.decompose(self.share)
        self.seconds = time.perf_counter() - began

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Put the factors back into the free directions."""
        if self.settings.hold == "gradients":
            return {}
        return {EFFECT: Readback(self.model.hold())}

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Put the weights together again."""
        self.model.fold()
        info = {"preserved_share": self.share, "decomposition_seconds": round(self.seconds, 3)}
        return TaskMemory(info=info)

    departures = (
        Departure(
            "what is kept orthogonal",
            "gradients",
            "PEFT: gradients; the authors' mini_trainer: gradients and, after a step, the factors",
            "both; PEFT alone is hold=gradients",
        ),
        Departure(
            "preserved before task i of n",
            "by layer, from the likeness of its input and output",
            "PEFT: whatever one sets, at least one direction; its guide advises (i-1)/n of all",
            "as the guide with tasks=n, (i-1)/i where n is unknown; the same share in all layers",
        ),
        Departure(
            "between two tasks",
            "the weights are put together and decomposed anew",
            "PEFT's example calls unload(), which gives the weights back without what was trained",
            "merged, then decomposed anew",
        ),
    )
