"""TreeLoRA: LoRA guided by a tree of task similarities, searched with a lower-confidence bound.

Source: Qian, Xie, Zhang, Zhao, Zhou: TreeLoRA (ICML 2025, arXiv 2506.10355), Eq. 1-3 and
Algorithm 1, made well-formed: the paper compares gradients of the live model under stored models,
the released code compares weights. Which of them is compared here is ``signature``.

Per optimizer step, from the second task on: a bandit walks the tree of earlier tasks to one of
them (Eq. 2), the distance xi of the live signature to its signature is the feedback, and an L1
penalty pulls the live signature toward the chosen path (Eq. 3).
Stored per task: the adapter, its signature [F] and the mean displacement of every block [D].
Cost per step: O(F) for one signature, O(depth) for the search, whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.methods._starts import GroupStart
from treelora_cli.methods.base import (
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
    TreeRecord,
)
from treelora_cli.models.adapted import AdaptedModel, Snapshot
from treelora_cli.tree.build import update_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.penalty import (
    PathTargets,
    block_weights,
    expand,
    l1_penalty,
    ramp_value,
    sign_gradient,
)
from treelora_cli.tree.scopes import ScopedSearch, make_search
from treelora_cli.tree.serial import from_document, from_tensors, to_document, to_tensors
from treelora_cli.tree.signatures import SignatureBank, block_means

# Signatures that are gradients: detached, so that the penalty acts on the gradient itself.
GRADIENTS = ("gradient", "query")


class TreeLoraSettings(MethodSettings):
    """What the recipe's ``method`` section may say for TreeLoRA.

    Under ``signature: lora_a`` distances favour the most recent task, because weights go on from
    task to task and drift; ``lora_delta`` compares what each task changed.
    """

    strength: Annotated[float, Field(ge=0)] = Field(
        0.5, alias="lambda", description="weight of the penalty, the same on every backbone"
    )
    ramp: Literal["task", "epoch", "none"] = Field(
        "task", description="how the penalty grows: over the task, over each epoch, not at all"
    )
    target: Literal["path", "leaf"] = Field(
        "path", description="pulled toward the means along the chosen path, or the task's own"
    )
    signature: Literal["lora_a", "lora_delta", "gradient", "query"] = Field(
        "lora_a",
        description="live weights (with start=continue they favour the last task, for weights "
        "drift), their change within the task, the mean gradient, or the paper's literal gradient "
        "of the present rows under an earlier adapter",
    )
    factors: Literal["A", "AB"] = Field("A", description="LoRA matrices that make the signature")
    start: Literal["continue", "fresh", "group"] = Field(
        "continue",
        description="a task starts from the last task's weights, from the common seeded start, or "
        "from the mean change of the group of tasks it resembles",
    )
    start_batches: Annotated[int, Field(gt=0)] = Field(
        4, description="steps' rows whose gradient finds the group"
    )


class _Guide:
    """What guides one task: search, targets and weights, all fixed when the task begins."""

    def __init__(
        self,
        bank: SignatureBank,
        tree: GradientTree,
        search: ScopedSearch,
        settings: TreeLoraSettings,
        device: torch.device,
    ) -> None:
        self.bank = bank
        self.search = search
        self.scales = bank.scales().to(device)
        self.targets = PathTargets(tree, bank, settings.target)
        weights = block_weights(settings.strength, 1.0, bank.widths, bank.displacement_scale())
        self.weights = expand(weights, bank.widths).to(device)

    def pull(self, signature: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Choose a task, observe its distance and learn from it.

        Args:
            signature: [F], the live one, detached.

        Returns:
            The penalty's target, [F] on the signature's device, and what the event shows.
        """
        arms = self.search.choose(lambda: self.bank.scaled_distances(signature, self.scales))
        xis = self.bank.pull(signature, arms, self.scales).tolist()
        self.search.update(arms, xis)
        return self.targets.of_arms(arms).to(signature.device), {"arms": list(arms), "xi": xis}

    def ask(
        self, gradient: Tensor, under: Callable[[int], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Choose a task and compare gradients of the same rows, now and under its adapter.

        Args:
            gradient: [F], the live one.
            under: gives the rows' gradient under a task's adapter, [F]; a forward and backward
                pass each. The exhaustive search asks for all of them.
        """
        asked: dict[int, Tensor] = {}

        def distances(arm: int) -> Tensor:
            if arm not in asked:
                asked[arm] = under(arm)
            return block_means((gradient - asked[arm]).abs(), self.bank.widths) / self.scales

        everyone = range(len(self.bank))
        arms = self.search.choose(lambda: torch.stack([distances(arm) for arm in everyone]))
        xi = float(distances(arms[0]).mean())
        self.search.update(arms, [xi])
        return asked[arms[0]], {"arms": list(arms), "xi": [xi]}


class TreeLora(Method):
    """Adapter goes on from task to task, pulled toward the most similar earlier tasks."""

    name = "treelora"
    # `gradient` signatures need gradients too; the engine's choice of processes asks for both.
    needs = frozenset({"penalty", "gradients"})
    Settings = TreeLoraSettings
    settings: TreeLoraSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with an empty tree."""
        super().start(stream, model)
        self.parameters = model.signature_parameters(self.settings.factors)
        self.bank = SignatureBank.empty(model.block_widths(self.settings.factors))
        self.tree: GradientTree | None = None
        self.guide: _Guide | None = None
        self.origin = self._weights()
        self.mean_gradient = torch.zeros_like(self.origin)
        self.gradients = 0
        self.observed: dict[str, Any] = {}
        self.snapshots: list[Callable[[], Snapshot]] = []
        self.group_start: GroupStart | None = None
        if self.settings.start == "group":
            self.group_start = GroupStart(model, self.settings.start_batches)
        if self.settings.signature == "query" and stream.bandit.scope == "block":
            raise UsageError(
                "method.signature=query takes one gradient a step, bandit.scope=block would take "
                "one for every block",
                "use bandit.scope=model",
            )

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read the tree and all signatures back.

        Raises:
            RunDirError: a task's tree is missing or is not one of this model.
        """
        banks = []
        for task in finished:
            record = task.memory.tree
            if record is None:
                raise RunDirError(
                    f"task {task.name} has no tree in the run directory",
                    "put tree/history back, or start a new run",
                )
            banks.append(from_tensors(record.tensors, [task.name]))
            self.tree = from_document(record.document)
            self.snapshots.append(task.adapter)
        if self.group_start is not None:
            self.group_start.restore(finished)
        if not banks:
            return
        if any(bank.widths != self.bank.widths for bank in banks):
            raise RunDirError(
                "the stored signatures are not of this model's shape", "use the run's own base"
            )
        self.bank = SignatureBank(
            tuple(name for bank in banks for name in bank.names),
            torch.cat([bank.values for bank in banks]),
            self.bank.widths,
            torch.cat([bank.displacements for bank in banks]),
        )

    def begin_task(self, task: TaskContext) -> None:
        """Choose the adapter's start, fix the scales and start the bandit anew."""
        self.task = task
        self.group: tuple[int, ...] = ()
        if self.group_start is not None:
            self.group = self.group_start.begin(task, self.tree, self.snapshots)
        elif self.settings.start == "fresh":
            self.model.reset()
        self.origin = self._weights()
        self.mean_gradient = torch.zeros_like(self.origin)
        self.gradients = 0
        self.observed = {}
        self.guide = None
        if self.tree is not None:
            self.guide = _Guide(
                self.bank, self.tree, self._new_search(), self.settings, self.device
            )

    @property
    def device(self) -> torch.device:
        """Where the adapter lives."""
        return self.model.device

    def _new_search(self) -> ScopedSearch:
        if self.tree is None:
            raise RuntimeError("there is nothing to search before the first task has ended")
        bandit = self.stream.bandit
        return make_search(
            bandit.search,
            self.tree,
            self.bank,
            scope=bandit.scope,
            c=bandit.c,
            delta=bandit.delta,
            seed=self.task.seed,
        )

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters]).float()

    def penalty(self, step: StepContext) -> Tensor | None:
        """L1 distance of the live weights to the chosen path; None where gradients are compared.

        Raises:
            DivergedError: the weights are no longer finite.
        """
        if self.guide is None or self.settings.signature in GRADIENTS:
            return None
        live = torch.cat([p.reshape(-1) for p in self.parameters]).float()
        if self.settings.signature == "lora_delta":
            live = live - self.origin
        target, self.observed = self.guide.pull(live.detach())
        return l1_penalty(live, target, self.guide.weights * self._ramp(step))

    def _ramp(self, step: StepContext) -> float:
        task = self.task
        return ramp_value(self.settings.ramp, step.step, task.steps, task.steps_per_epoch)

    def after_backward(self, step: StepContext) -> None:
        """For gradient signatures: update the running mean and add Eq. 3's term to the gradient.

        The signature is detached, so the penalty has no usable first derivative; its gradient is
        taken as weight * sign(gradient - target), which sets the Hessian to the identity. With
        ``gradient`` the mean so far is compared with the stored means; with ``query`` this step's
        gradient with the same rows' gradient under the chosen task's adapter, which is the target.
        """
        if self.settings.signature not in GRADIENTS:
            return
        gradient = torch.cat([_gradient(p).reshape(-1) for p in self.parameters]).float()
        self.gradients += 1
        self.mean_gradient += (gradient - self.mean_gradient) / self.gradients
        if self.guide is None:
            return
        weights = self.guide.weights * self._ramp(step)
        if self.settings.signature == "query":
            target, self.observed = self.guide.ask(gradient, partial(self._under, step))
            change = sign_gradient(gradient, target, weights)
        else:
            target, self.observed = self.guide.pull(self.mean_gradient)
            change = sign_gradient(self.mean_gradient, target, weights)
        at = 0
        for parameter in self.parameters:
            part = change[at : at + parameter.numel()].view_as(parameter)
            parameter.grad = _gradient(parameter) + part.to(parameter.dtype)
            at += parameter.numel()

    def _under(self, step: StepContext, arm: int) -> Tensor:
        """Return the gradient of this step's rows under an earlier task's adapter, [F]."""
        found = step.gradient_under(self.snapshots[arm]())
        by_parameter = dict(zip(map(id, self.model.parameters()), found, strict=True))
        return torch.cat([by_parameter[id(p)].reshape(-1) for p in self.parameters]).float()

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report the arms pulled and their distances."""
        return self.observed

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Add the task to the tree.

        Raises:
            DivergedError: the signature is not finite.
        """
        moved = self._weights() - self.origin
        signature = {"lora_a": self._weights(), "lora_delta": moved}.get(
            self.settings.signature, self.mean_gradient
        )
        displacement = block_means(moved.abs(), self.bank.widths)
        alone = SignatureBank.empty(self.bank.widths).add(task.name, signature, displacement)
        self.bank = self.bank.add(task.name, signature, displacement)
        tree = self.stream.tree
        self.tree = update_tree(
            self.tree, self.bank, split=tree.split, block_rule=tree.block, rebuild=tree.rebuild
        )
        document = to_document(self.tree, self.bank, self.settings.signature, self.settings.factors)
        info: dict[str, Any] = {}
        if self.guide is not None:
            info["bandit"] = self.guide.search.statistics()
        if self.group:
            info["started_from"] = [self.bank.names[member] for member in self.group]
        tensors = {} if self.group_start is None else self.group_start.end(task.name)
        if self.group_start is not None or self.settings.signature == "query":
            snapshot = self.model.snapshot()
            self.snapshots.append(lambda: snapshot)
        return TaskMemory(tensors, info, TreeRecord(document, to_tensors(alone)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return where the task began, the running mean and the bandit's statistics."""
        tensors = {"origin": self.origin.cpu(), "mean_gradient": self.mean_gradient.cpu()}
        values: dict[str, Any] = {"gradients": self.gradients}
        if self.guide is not None:
            values["search"] = self.guide.search.state()
        return tensors, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint.

        Raises:
            RunDirError: the bandit's state belongs to another search.
        """
        self.origin = tensors["origin"].to(self.device)
        self.mean_gradient = tensors["mean_gradient"].to(self.device)
        self.gradients = int(values["gradients"])
        if self.guide is not None:
            self.guide.search.load_state(values["search"])


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
