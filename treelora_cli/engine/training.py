"""Train the live adapter on one task: a plain loop around the method's hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treelora_cli.engine.batches import RowPlan
from treelora_cli.engine.gradients import gradient_under, step_batches
from treelora_cli.engine.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from treelora_cli.errors import DivergedError
from treelora_cli.methods.base import Method, StepContext, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch, Example
from treelora_cli.models.forward import answer_loss
from treelora_cli.recipe import OptimSection
from treelora_cli.rundir import faults

ADAPTER, OPTIMIZER, METHOD, RNG = "adapter.", "optimizer.", "method.", "rng."


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did; values are plain numbers."""

    loss: float
    penalty: float | None
    lr: float
    tokens: int
    info: dict[str, Any]


class TaskTrainer:
    """Trains one task, step by step, from the start or from a checkpoint.

    Args:
        adapted: the model; its live adapter is trained.
        method: already begun on this task.
        task: what is being trained.
        examples: the task's training rows, tokenised.
        plan: which rows each step sees.
        optim: the recipe's ``optim`` section.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        method: Method,
        task: TaskContext,
        examples: Sequence[Example],
        plan: RowPlan,
        optim: OptimSection,
    ) -> None:
        self.adapted = adapted
        self.method = method
        self.task = task
        self.examples = examples
        self.plan = plan
        self.optim = optim
        self.parameters = adapted.parameters()
        self.optimizer = build_optimizer(self.parameters, optim)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        torch.manual_seed(task.seed)

    def run(self, after_step: Callable[[StepResult], None]) -> None:
        """Train to the last step.

        Args:
            after_step: called after every step, when ``self.step`` steps are done; may raise.

        Raises:
            DivergedError: a loss, penalty or gradient is not finite; the weights are those before
                the step.
        """
        self.adapted.peft.train()
        try:
            while self.step < self.plan.steps:
                started = time.perf_counter()
                faults.hit("step")
                result = self._one_step()
                self.step += 1
                self.tokens += result.tokens
                self.seconds += time.perf_counter() - started
                after_step(result)
        finally:
            self.adapted.peft.eval()

    def _one_step(self) -> StepResult:
        lr = learning_rate(self.optim, self.step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        pad = self.adapted.backbone.tokenizer.pad_token_id
        size = self.optim.micro_batch_size
        batches = list(step_batches(self.examples, self.plan, self.step, size, pad))
        loss, penalty = self._backward(batches)
        context = StepContext(
            self.step, loss, gradient_under=partial(gradient_under, self.adapted, batches)
        )
        if not self.method.per_forward:
            penalty = self.method.penalty(context)
            if penalty is not None:
                penalty.backward()  # type: ignore[no-untyped-call]
        self.method.after_backward(context)
        norm = self._clip()
        values = (float(loss), None if penalty is None else float(penalty.detach()), float(norm))
        self._check_finite(values)
        self.optimizer.step()
        info = self.method.after_step(context)
        return StepResult(values[0], values[1], lr, sum(batch.tokens for batch in batches), info)

    def _backward(self, batches: list[Batch]) -> tuple[Tensor, Tensor | None]:
        """Add up the step's gradient; return its loss and, where asked for, its penalties' sum."""
        answer_tokens = sum(batch.answer_tokens for batch in batches)
        loss = torch.zeros((), device=self.adapted.device)
        penalties: list[Tensor] = []
        for number, batch in enumerate(batches):
            part = answer_loss(self.adapted, batch.to(self.adapted.device)) / answer_tokens
            loss += part.detach()
            if self.method.per_forward:
                share = batch.answer_tokens / answer_tokens
                context = StepContext(self.step, part.detach() / share, number, len(batches))
                penalty = self.method.penalty(context)
                if penalty is not None:
                    part = part + penalty * share
                    penalties.append(penalty.detach() * share)
            part.backward()  # type: ignore[no-untyped-call]
        return loss, torch.stack(penalties).sum() if penalties else None

    def _clip(self) -> Tensor:
        limit = self.optim.grad_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def _check_finite(self, values: tuple[float, float | None, float]) -> None:
        for name, value in zip(("loss", "penalty", "gradient norm"), values, strict=True):
            if value is not None and not math.isfinite(value):
                raise DivergedError(
                    f"task {self.task.name}: the {name} is {value} at step {self.step + 1} of "
                    f"{self.plan.steps}; the weights before the step are kept",
                    "lower optim.lr, raise optim.warmup_steps or set optim.grad_clip",
                )

    def carry_on(self, optimizer: dict[str, Tensor]) -> None:
        """Start with the optimizer's state of the task before.

        Raises:
            RunDirError: it does not fit the model.
        """
        load_optimizer_tensors(self.optimizer, optimizer)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything a resume inside the task needs: tensors and JSON values."""
        tensors = {ADAPTER + key: value for key, value in self.adapted.snapshot().items()}
        named = optimizer_tensors(self.optimizer)
        tensors |= {OPTIMIZER + key: value for key, value in named.items()}
        method_tensors, method_values = self.method.state()
        tensors |= {METHOD + key: value for key, value in method_tensors.items()}
        tensors[RNG + "torch"] = torch.get_rng_state()
        if self.adapted.device.type == "cuda":
            tensors[RNG + "cuda"] = torch.cuda.get_rng_state(self.adapted.device)
        values = {
            "task": self.task.name,
            "index": self.task.index,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "method": method_values,
        }
        return tensors, values

    def resume(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint of this task.

        Raises:
            RunDirError: the checkpoint does not fit the model.
        """
        self.adapted.restore(_part(tensors, ADAPTER))
        load_optimizer_tensors(self.optimizer, _part(tensors, OPTIMIZER))
        self.method.load_state(_part(tensors, METHOD), values["method"])
        torch.set_rng_state(tensors[RNG + "torch"])
        if RNG + "cuda" in tensors and self.adapted.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[RNG + "cuda"], self.adapted.device)
        self.step = int(values["step"])
        self.tokens = int(values["tokens"])
        self.seconds = float(values["seconds"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = tensors.items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}
