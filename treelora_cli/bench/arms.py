"""What is timed against what: loops that use PEFT and torch alone, and the engine's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from treelora_cli.engine.batches import RowPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.gradients import first_gradient
from treelora_cli.engine.optim import build_optimizer
from treelora_cli.engine.training import TaskTrainer
from treelora_cli.methods.base import Method, StreamContext, TaskContext, build_method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Example
from treelora_cli.models.probe import Probe
from treelora_cli.recipe import MethodSection, OptimSection, Recipe


class PlainLoop:
    """LoRA training with PEFT and torch alone, nothing that is not needed.

    Rows of one length, so that there is nothing to pad; tensors made of the tokens at every step,
    as any loader has to; logits at the answers alone; no value read back.

    Args:
        adapted: its PEFT model is trained.
        examples: rows of one length with answers of one length, all of one step.
        optim: learning rate and clipping.
    """

    def __init__(
        self, adapted: AdaptedModel, examples: Sequence[Example], optim: OptimSection
    ) -> None:
        self.peft = adapted.peft
        self.peft.train()
        self.parameters = adapted.parameters()
        self.optimizer = build_optimizer(adapted.trainable(), optim)
        self.clip = optim.grad_clip
        self.device = adapted.device
        self.rows = [example.tokens for example in examples]
        self.keep = len(examples[0].tokens) - examples[0].answer_start
        self.loss: Tensor | None = None

    def step(self) -> None:
        """Do one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        ids = torch.tensor(self.rows)
        answers = ids[:, -self.keep :].flatten().to(self.device, non_blocking=True)
        ids = ids.to(self.device, non_blocking=True)
        output = self.peft(input_ids=ids, use_cache=False, logits_to_keep=self.keep + 1)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss = functional.cross_entropy(logits, answers)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.loss = loss.detach()


class RowLoop:
    """The papers' data path: a row a forward pass, logits over the whole prompt, accumulation.

    A row's loss counts with its share of the step's answer tokens, so that the gradient is the
    engine's; the papers' code takes the plain mean over rows, which costs the same.

    Args:
        adapted: its PEFT model is trained.
        examples: the training rows.
        plan: which rows each step sees.
        optim: learning rate and clipping.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        examples: Sequence[Example],
        plan: RowPlan,
        optim: OptimSection,
    ) -> None:
        self.peft = adapted.peft
        self.peft.train()
        self.device = adapted.device
        self.parameters = adapted.parameters()
        self.optimizer = build_optimizer(adapted.trainable(), optim)
        self.clip = optim.grad_clip
        self.examples = examples
        self.plan = plan
        self.number = 0
        self.loss: Tensor | None = None

    def step(self) -> None:
        """Do one optimizer step."""
        rows = [self.examples[row] for row in self.plan.rows(self.number)]
        total = sum(len(row.tokens) - row.answer_start for row in rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for row in rows:
            share = (len(row.tokens) - row.answer_start) / total
            part = self._loss(row) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.number += 1
        self.loss = loss

    def _loss(self, row: Example) -> Tensor:
        ids = torch.tensor([row.tokens])
        labels = ids.clone()
        labels[:, : row.answer_start] = IGNORED
        output = self.peft(
            input_ids=ids.to(self.device, non_blocking=True),
            attention_mask=torch.ones_like(ids).to(self.device, non_blocking=True),
            labels=labels.to(self.device, non_blocking=True),
            use_cache=False,
        )
        loss: Tensor = output.loss
        return loss


def new_method(name: str, adapted: AdaptedModel, seed: int) -> Method:
    """Return a method with its default settings that has met the model.

    Raises:
        UsageError: no such method, or one that does not fit the model.
    """
    recipe = Recipe(method=MethodSection(name=name))
    method = build_method(recipe)
    method.start(StreamContext(seed, recipe.bandit, recipe.tree, recipe.lora), adapted)
    return method


def task_context(index: int, forwards: Forwards, seed: int, adapted: AdaptedModel) -> TaskContext:
    """Return what a method is told of a task.

    Args:
        index: its place in the stream.
        forwards: its batches.
        seed: its seed.
        adapted: the model.
    """
    plan = forwards.plan
    return TaskContext(
        index,
        f"task-{index}",
        plan.steps,
        plan.steps_per_epoch,
        seed,
        forwards.per_epoch(),
        probe=partial(first_gradient, adapted, forwards),
        rows=forwards.examples,
        ask=Probe(adapted, forwards.batches),
    )


def begin(
    method: Method,
    adapted: AdaptedModel,
    task: TaskContext,
    forwards: Forwards,
    optim: OptimSection,
) -> TaskTrainer:
    """Begin a task as the stream does; return its trainer, the model in training mode.

    Args:
        method: has met the model and holds the tasks before this one.
        adapted: the model.
        task: the task.
        forwards: its batches.
        optim: the optimizer's settings.
    """
    method.begin_task(task)
    trainer = TaskTrainer(adapted, method, task, forwards, optim)
    adapted.peft.train()
    return trainer
