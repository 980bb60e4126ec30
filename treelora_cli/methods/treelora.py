"""TreeLoRA: LoRA guided by a tree of task similarities, searched with a lower-confidence bound.

Source: Qian, Xie, Zhang, Zhao, Zhou: TreeLoRA (ICML 2025, arXiv 2506.10355), Eq. 1-3 and
Algorithm 1, made well-formed: the paper compares gradients of the live model under stored models,
the released code compares weights. Which of them is compared here is ``signature``.

Per optimizer step, from the second task on: a bandit walks the tree of earlier tasks to one of
them (Eq. 2), the distance xi of the live signature to its signature is the feedback, and an L1
penalty pulls the live signature toward it (Eq. 3). By default that is so for a quarter of the task;
then the nearest task is fixed, and A and B are soft-thresholded onto its adapter (``_proximal``).
With ``form: subgradient`` it goes on to the end, as in the paper.
Stored per task: the adapter, its signature [F] and the mean displacement of every block [D].
Cost per step: O(F) for one signature, O(depth) for the search, whatever the number of tasks.
No step waits for the device: see ``_guide``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.methods._guide import Guide
from treelora_cli.methods._proximal import MOVED, Proximal
from treelora_cli.methods._settings import TreeLoraSettings
from treelora_cli.methods._starts import GroupStart, group_of
from treelora_cli.methods.base import (
    Method,
    MethodSettings,
    Need,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
    TreeRecord,
    stored_tree,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.tree.build import update_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.penalty import PathTargets, l1_penalty, ramp_value, sign_gradient
from treelora_cli.tree.scopes import ScopedSearch, make_search
from treelora_cli.tree.serial import from_document, from_tensors, to_document, to_tensors
from treelora_cli.tree.signatures import SignatureBank, block_means

# Signatures that are gradients: detached, so that the penalty acts on the gradient itself.
GRADIENTS = ("gradient", "query")


class TreeLora(Method):
    """Adapter goes on from task to task, pulled toward the most similar earlier tasks."""

    name = "treelora"
    needs: frozenset[Need] = frozenset({"penalty"})
    Settings = TreeLoraSettings
    settings: TreeLoraSettings

    def __init__(self, settings: MethodSettings) -> None:
        super().__init__(settings)
        if self.settings.signature in GRADIENTS:
            self.needs |= {"gradients"}
        if self.settings.form == "proximal":
            self.needs |= {"weights"}

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with an empty tree."""
        super().start(stream, model)
        self.parameters = model.signature_parameters(self.settings.factors)
        self.bank = SignatureBank.empty(model.block_widths(self.settings.factors))
        self.tree: GradientTree | None = None
        self.guide: Guide | None = None
        self.origin = self._weights()
        self.mean_gradient = torch.zeros_like(self.origin)
        self.gradients = 0
        self.observed: dict[str, Any] = {}
        self.snapshots: list[Callable[[], Snapshot]] = []
        self.group_start: GroupStart | None = None
        if self.settings.start == "group":
            self.group_start = GroupStart(model, self.settings.start_batches)
        self.proximal: Proximal | None = None
        if self.settings.form == "proximal":
            self.proximal = Proximal(model, self.settings.strength)
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
        for task in finished:
            record = stored_tree(task)
            alone = from_tensors(record.tensors, [task.name])
            if alone.widths != self.bank.widths:
                raise RunDirError(
                    "the stored signatures are not of this model's shape", "use the run's own base"
                )
            self.bank = self.bank.add(task.name, alone.values[0], alone.displacements[0])
            self.snapshots.append(task.adapter)
        if finished:
            self.tree = from_document(stored_tree(finished[-1]).document)
        if self.group_start is not None:
            self.group_start.restore(finished)
        if self.proximal is not None:
            self.proximal.restore(finished)

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
        self.reference: tuple[int, ...] = ()
        self.steps_left = 0
        if self.proximal is not None:
            self.proximal.begin(self.model.snapshot())
        self.guide = None
        if self.tree is not None:
            self.guide = Guide(
                self.bank,
                self._new_search(),
                PathTargets(self.tree, self.bank, self.settings.target),
                self.settings.strength,
                self.device,
            )
            self._aim(self.guide)

    def _aim(self, guide: Guide) -> None:
        """Choose the task to compare with at the next step.

        A search that looks at all tasks sees the signature as it is now; of the literal gradient
        there is none before the step's rows are read, so there it chooses within the step.
        """
        query = self.settings.signature == "query"
        if query and self.stream.bandit.search == "exhaustive":
            guide.aim((), fetch=False)
            return
        arms = guide.search.choose(
            lambda: guide.bank.scaled_distances(self._signature(), guide.scales)
        )
        guide.aim(arms, fetch=not query)

    def _signature(self) -> Tensor:
        """Return the live signature, float32 [F], detached."""
        if self.settings.signature in GRADIENTS:
            return self.mean_gradient
        live = self._weights()
        return live - self.origin if self.settings.signature == "lora_delta" else live

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
        with torch.no_grad():
            return torch.cat([p.view(-1) for p in self.parameters]).float()

    def penalty(self, step: StepContext) -> Tensor | None:
        """L1 distance of the live weights to the chosen path; None where gradients are compared."""
        if self.guide is None or self.reference or self.settings.signature in GRADIENTS:
            return None
        signature = self._signature()
        target, self.observed = self.guide.pull(signature)
        penalty = l1_penalty(signature, target, self.guide.weights, self.parameters)
        return penalty * self._ramp(step)

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
        if self.guide is None or self.reference:
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
        """Learn from the step before, choose for the next one; report this one's arms."""
        if self.guide is None:
            return {}
        if self.reference:
            self._proximal().step()
            return {}
        self.guide.learn(left=1)
        self._aim(self.guide)
        done = step.step + 1
        if self.proximal is not None and done >= self.settings.fixed_after * self.task.steps:
            self.guide.learn(left=0)
            self._fix(self._nearest_group(self.guide), self.task.steps - done)
        return self.observed

    def _proximal(self) -> Proximal:
        if self.proximal is None:
            raise RuntimeError("a group is fixed in the proximal form only")
        return self.proximal

    def _nearest_group(self, guide: Guide) -> tuple[int, ...]:
        """Return the group of the task whose feedback was lowest on average, the earlier on ties.

        Not of the one pulled most often: where a quarter of a task is hardly more steps than there
        are tasks, that is the one which happened to come first.
        """
        means = guide.means()
        task = min(means, key=lambda arm: (means[arm], arm))
        if self.settings.target == "leaf" or self.tree is None:
            return (task,)
        return group_of(self.tree, task)

    def _fix(self, group: Sequence[int], steps_left: int) -> None:
        self.reference, self.steps_left = tuple(group), steps_left
        members = [self.snapshots[member]() for member in self.reference]
        self._proximal().fix(members, steps_left)

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
            self.guide.learn(left=0)
            info["bandit"] = self.guide.search.statistics()
        if self.group:
            info["started_from"] = [self.bank.names[member] for member in self.group]
        tensors = {} if self.group_start is None else self.group_start.end(task.name)
        if self.proximal is not None:
            tensors[MOVED] = self.proximal.end(self.model.snapshot())
            info["group"] = [self.bank.names[member] for member in self.reference]
        if self.group_start or self.proximal or self.settings.signature == "query":
            snapshot = self.model.snapshot()
            self.snapshots.append(lambda: snapshot)
        record = TreeRecord(document, to_tensors(alone))
        return TaskMemory(tensors, info, record, self.reference)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return where the task began, the running mean and the bandit's statistics."""
        tensors = {"origin": self.origin.cpu(), "mean_gradient": self.mean_gradient.cpu()}
        values: dict[str, Any] = {"gradients": self.gradients}
        if self.guide is not None:
            values["guide"] = self.guide.state()
        if self.proximal is not None:
            tensors |= self.proximal.state()
            values["fixed"] = [list(self.reference), self.steps_left]
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
            self.guide.load_state(values["guide"], fetch=self.settings.signature != "query")
        if self.proximal is not None:
            self.proximal.load_state(tensors)
            group, steps_left = values["fixed"]
            if group:
                self._fix(group, int(steps_left))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
