"""TreeLoRA as released, step by step and oddities included, to repeat and compare published runs.

Source: the authors' repository (Qian et al., ICML 2025), ``model/Regular/Tree_LoRA.py`` and
``utils/kd_lora_tree.py``, commit c6a9b6d. ``treelora methods treelora-official`` shows where it
departs from the paper, and where this module departs from it.

Per forward pass, from the second task on, with A the LoRA A matrices as L rows of equal width, T
the forward passes of an epoch, t this one, and G_k what is stored of task k:
loss - loss' reg (t / T) s / (s - 1e-5)', s = sum_l <A_l, G_k(l),l>, primes constants, k(l) drawn
for every row. Stored per task: the running vector of its last epoch, L rows. Cost per forward pass:
O(L D), and O(N L) for the scores of N earlier tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
    TreeRecord,
    stored_tree,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.tree.official import (
    OfficialSearch,
    accumulate,
    as_gradient_tree,
    build,
    differences,
    gather,
    regularizer,
    strength,
)
from treelora_cli.tree.serial import from_tensors, to_document, to_tensors
from treelora_cli.tree.signatures import SignatureBank


class OfficialSettings(MethodSettings):
    """What the recipe's ``method`` section may say for the released TreeLoRA."""

    reg: Annotated[float, Field(ge=0)] = Field(
        0.5, description="share of the loss that the penalty takes off at an epoch's end"
    )


class TreeLoraOfficial(Method):
    """TreeLoRA as its authors released it: a penalty on dot products, arms drawn at random."""

    name = "treelora-official"
    needs = frozenset({"penalty"})
    per_forward = True
    Settings = OfficialSettings
    settings: OfficialSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with nothing stored.

        Raises:
            UsageError: the A matrices are not all of one size, which the released code relies on.
        """
        super().start(stream, model)
        named = model.named_factors("A")
        self.parameters = [parameter for _, parameter in named]
        sizes = {parameter.numel(): name for name, parameter in named}
        if len(sizes) > 1:
            listed = ", ".join(f"{name} has {size}" for size, name in sorted(sizes.items()))
            raise UsageError(
                f"{self.name} needs LoRA A matrices of one size, but in entries {listed}",
                "list modules of one input width, e.g. --set 'lora.targets=[q_proj,v_proj]'",
            )
        self.names: list[str] = []
        self.stored = torch.zeros(0, len(named), max(sizes))

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read what is stored of all tasks; the tree is built from it.

        Raises:
            RunDirError: it is missing or is not of this model.
        """
        vectors = [self.stored]
        for task in finished:
            bank = from_tensors(stored_tree(task).tensors, [task.name])
            if bank.widths != self._widths():
                raise RunDirError(
                    f"what is stored of task {task.name} is not of this model's shape",
                    "use the run's own base",
                )
            self.names.append(task.name)
            vectors.append(bank.values.view(1, *self.stored.shape[1:]))
        self.stored = torch.cat(vectors)

    def _widths(self) -> tuple[int, ...]:
        return (self.stored.shape[2],) * self.stored.shape[1]

    def _keep(self, name: str, vector: Tensor) -> None:
        self.names.append(name)
        self.stored = torch.cat([self.stored, vector.view(1, *self.stored.shape[1:])])

    def begin_task(self, task: TaskContext) -> None:
        """Rebuild the tree over the tasks so far; the adapter goes on from where it was."""
        self.task = task
        self.generator = torch.Generator().manual_seed(task.seed)
        self.pulls = torch.zeros(len(self.names), dtype=torch.int64)
        self.pulls_of_step = torch.zeros_like(self.pulls)
        self.search: OfficialSearch | None = None
        if self.names:
            tree = build(differences(self.stored), range(len(self.names)), self.stored.shape[1])
            self.search = OfficialSearch(self.stored, tree, task.forwards_per_epoch)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.number = 0
        self.running = torch.zeros(self.stored.shape[1:], device=self.model.device)
        if self.search is not None:
            self.search.begin_epoch()

    def penalty(self, step: StepContext) -> Tensor | None:
        """Go one round on: add to the running vector, draw a task for every row, pull toward them.

        Raises:
            DivergedError: the weights are no longer finite.
        """
        if step.forward == 0:
            self.pulls_of_step.zero_()
            if step.step % self.task.steps_per_epoch == 0:
                self._begin_epoch()
        number, rounds = self.number, self.task.forwards_per_epoch
        self.number += 1
        matrix = torch.stack([parameter.reshape(-1) for parameter in self.parameters]).float()
        self.running = accumulate(self.running, matrix, rounds)
        if self.search is None:
            return None
        selected = self.search.draw(number, self.generator)
        self.search.update(self.running, selected)
        self.pulls_of_step += torch.bincount(selected, minlength=len(self.names))
        targets = gather(self.stored, selected).to(matrix.device)
        weight = strength(self.settings.reg, number, rounds)
        return -regularizer(matrix, targets, step.loss, weight)

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report how many rows were pulled toward each earlier task, over the step's passes."""
        if self.search is None:
            return {}
        self.pulls += self.pulls_of_step
        return {"pulls": self.pulls_of_step.tolist()}

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Keep the running vector of the last epoch, and show the tree with the new task."""
        self._keep(task.name, self.running.cpu())
        alone = self._bank([task.name], self.stored[-1:])
        features = differences(self.stored)
        shown = self._bank(self.names, features)
        root = build(features, range(len(self.names)), self.stored.shape[1])
        document = to_document(as_gradient_tree(root, shown), shown, "lora_a", "A")
        record = TreeRecord(document, to_tensors(alone))
        if self.search is None:
            return TaskMemory(tree=record)
        bandit = {"search": "official", "pulls": self.pulls.tolist()}
        return TaskMemory(info={"bandit": [bandit]}, tree=record)

    def _bank(self, names: Sequence[str], rows: Tensor) -> SignatureBank:
        widths = self._widths()
        unmeasured = torch.zeros(len(names), len(widths))
        return SignatureBank(tuple(names), rows.flatten(1), widths, unmeasured)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the running vector, the epoch's statistics and the generator."""
        tensors = {"running": self.running.cpu(), "generator": self.generator.get_state()}
        if self.search is not None:
            tensors["pulls"] = self.pulls.clone()
            tensors["similarity"] = self.search.similarity.clone()
            tensors["counts"] = self.search.counts.clone()
        return tensors, {"round": self.number}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.number = int(values["round"])
        self.running = tensors["running"].to(self.model.device)
        self.generator.set_state(tensors["generator"])
        if self.search is not None:
            self.pulls = tensors["pulls"].clone()
            self.search.similarity = tensors["similarity"].clone()
            self.search.counts = tensors["counts"].clone()

    departures = (
        Departure(
            "gradient",
            "mean of the task's loss gradient",
            "mean of the A matrices' values; no gradient is read, B is left out",
            "as released",
        ),
        Departure(
            "running vector",
            "mean over the task",
            "L/T times the sum over one epoch (1/T of the whole is added once per row); "
            "in bfloat16 the sum stalls after some 350 additions",
            "as released, but in float32, where nothing stalls",
        ),
        Departure(
            "what is stored",
            "a gradient per task",
            "the running vector of the last epoch alone",
            "as released, and kept in the run directory (the released code cannot resume)",
        ),
        Departure(
            "tree",
            "threshold on L1 distances to the mean",
            "lower median of dot products with the mean, of differences of consecutive tasks; "
            "level d looks at row d alone; two tasks, and ties, are cut by position",
            "as released",
        ),
        Departure(
            "adding a task",
            "inserted at the nearest leaf",
            "the tree is built from nothing",
            "as released",
        ),
        Departure(
            "search",
            "descent to the least lower confidence bound",
            "a draw for every row from a softmax over all tasks; the tree enters only as a factor "
            "on one child of the root: its median, 1.5 at the most, possibly negative",
            "as released",
        ),
        Departure(
            "sign of the bound",
            "near tasks are preferred",
            "the bound of a negated distance is negated once more: far tasks are preferred",
            "as released",
        ),
        Departure(
            "draws",
            "least bound",
            "scores are brought within a range of 1, so no task is drawn more than e times as "
            "often as another: close to uniform",
            "as released, from a generator of the method's own that is seeded per task and "
            "checkpointed; torch's global one, shared with dropout, cannot be repeated",
        ),
        Departure(
            "bonus",
            "2 sqrt(log t / n)",
            "sqrt(log(2T(t+1)(t+2)) / (2n + 1e-5))",
            "as released",
        ),
        Departure(
            "statistics",
            "kept over the task",
            "forgotten at every epoch",
            "as released",
        ),
        Departure(
            "distance",
            "between gradients",
            "between the part of a sum so far and a whole sum",
            "as released",
        ),
        Departure(
            "penalty",
            "L1 distance to the chosen task",
            "loss reg (t/T) s / (s - 1e-5) taken off, s the dot product with the drawn rows, "
            "divisor and loss constants: the gradient of log |s|, whatever the scale",
            "as released; where the divisor is exactly zero it becomes 1e-5 instead of infinity",
        ),
        Departure(
            "ramp",
            "none",
            "t/T: from zero at the start of every epoch",
            "as released",
        ),
        Departure(
            "when",
            "once a step",
            "in every forward pass, T counts forward passes",
            "as released; a pass counts with its share of the step's answer tokens, where the "
            "released code gives every pass of a step the same weight",
        ),
        Departure(
            "reported loss",
            "not said",
            "task loss less penalty: shrinks to half over an epoch with reg 0.5",
            "task loss and penalty apart",
        ),
        Departure(
            "optimizer",
            "not said",
            "one Adam for the whole stream: its moments go on from task to task",
            "a new AdamW per task; optim.carry=true goes on as released",
        ),
        Departure(
            "shapes",
            "any",
            "all A matrices must be of one size",
            "as released; anything else is refused with the modules' names",
        ),
    )
