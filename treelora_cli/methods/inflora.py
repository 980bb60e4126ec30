"""InfLoRA: each task's down-projections are designed to read only what earlier tasks did not use.

Source: Liang & Li: InfLoRA, Interference-Free Low-Rank Adaptation for Continual Learning (CVPR
2024, arXiv 2404.00228), and the released code. The paper writes W + sum over tasks of A_t B_t with
B_t the down-projection; in PEFT's names, used here, that is A, and the up-projection is B.

Before task t every module's inputs x on (part of) the new task's rows are read at the present
weights, C = sum of x x'. With F a basis of the inputs that no earlier task used, A is the r
eigenvectors of F' C F with the largest eigenvalues (times F, over sqrt(3)), and is frozen; B starts
at zero and is trained. So what task t adds, s B A, is zero on all that the earlier tasks' memory
holds. After the task the inputs are read again, and enough of their directions become used
(``_subspace``) for a share e_t of their energy, which rises from ``energy`` toward ``last_energy``
over ``tasks`` tasks. Earlier adapters stay in the sum, frozen.

Stored per task: the sum, one LoRA of rank t r; for all modules of one input [d, at most d/2]
float32, the used or the free inputs, whichever are fewer. Cost: reading and answering grow by a
LoRA of rank r with every task; designing takes two readings of ``rows`` rows and eigenvectors of a
[d, d] matrix for every input of a module, whatever the number of tasks. The room is finite: when
all inputs are used, a task's A is zero and nothing is learned; ``used`` in task.json says how far
it has come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from treelora_cli.errors import RunDirError
from treelora_cli.methods._inputs import Inputs, read_inputs
from treelora_cli.methods._memory import sample_rows
from treelora_cli.methods._subspace import InputSpace, design, energy_used, with_inputs
from treelora_cli.methods._sums import SummedLora, pairs
from treelora_cli.methods.base import (
    EFFECT,
    Departure,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel

USED, FREE = "inputs.used.", "inputs.free."
"""Before a module's name among the tensors a task stores."""

logger = logging.getLogger("treelora")


class InfLoraSettings(MethodSettings):
    """InfLoRA's own settings."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95,
        description="share of the first task's input energy that later tasks must not read; the "
        "released scripts: 0.95 (CIFAR-100, DomainNet), 0.98 (ImageNet-R)",
    )
    last_energy: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share that the threshold rises toward, without reaching it"
    )
    tasks: Annotated[int, Field(gt=0)] = Field(
        10, description="tasks over which it rises; the released code: all there will be"
    )
    rows: Annotated[int, Field(gt=0)] = Field(
        200, description="training rows whose inputs are read, before and after each task"
    )


class InfLora(SummedLora):
    """A sum of LoRA adapters whose frozen A reads no input that earlier tasks used."""

    name = "inflora"
    Settings = InfLoraSettings
    settings: InfLoraSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Freeze A; nothing is used yet."""
        super().start(stream, model)
        model.freeze_adapter(A=True, B=False)
        self.spaces: dict[str, InputSpace] = {}
        self.taken = 0.0

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read what the tasks have used of every input; the last one's memory says it for all.

        Raises:
            RunDirError: it is missing.
        """
        if not finished:
            return
        self.spaces = {
            key.removeprefix(prefix): InputSpace(basis, is_free)
            for prefix, is_free in ((USED, False), (FREE, True))
            for key, basis in finished[-1].memory.tensors.items()
            if key.startswith(prefix)
        }
        if not self.spaces:
            raise RunDirError(
                f"task {finished[-1].name} was stored without its input spaces",
                "put its method.safetensors back from a copy, or start a new run",
            )

    def begin_task(self, task: TaskContext) -> None:
        """Design A from what the task's rows make the modules read; B is zero."""
        super().begin_task(task)
        inputs = self._inputs(task)
        rank = self.stream.lora.rank
        designed = {
            module: design(self._space(module, len(C)), C, rank)
            for module, C in inputs.sums.items()
        }
        with torch.no_grad():
            for pair in pairs(self.model.live_parameters):
                pair.A.copy_(designed[inputs.first[pair.module]])
        idle = sum(not rows.any() for rows in designed.values())
        if idle:
            logger.warning(
                "task %s: earlier tasks have used up %d of %d modules' inputs; nothing is learned "
                "there (lower method.energy leaves more room)",
                task.name,
                idle,
                len(designed),
            )
        self.taken = self._taken(inputs)

    def learns(self, key: str) -> bool:
        """Only B is trained."""
        return ".lora_B." in key

    def _inputs(self, task: TaskContext) -> Inputs:
        rows = sample_rows(task.rows, self.settings.rows, task.seed)
        return read_inputs(self.model, rows, task.ask)

    def _space(self, module: str, width: int) -> InputSpace:
        return self.spaces.get(module) or InputSpace.unused(width)

    def _taken(self, inputs: Inputs) -> float:
        """Return the mean share of the inputs' energy that A must not read."""
        shares = [energy_used(self._space(module, len(C)), C) for module, C in inputs.sums.items()]
        return float(torch.stack(shares).mean())

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report, with the first step, the share of the input energy that the design left out."""
        return {EFFECT: self.taken} if step.step == 0 else {}

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Read the inputs at the trained weights; they are used from now on."""
        threshold = self._threshold(task.index)
        for module, C in self._inputs(task).sums.items():
            self.spaces[module] = with_inputs(self._space(module, len(C)), C, threshold)
        tensors = {
            (FREE if space.is_free else USED) + module: space.basis
            for module, space in self.spaces.items()
        }
        used = sum(space.share for space in self.spaces.values()) / len(self.spaces)
        return TaskMemory(tensors, {"used": used, "taken": self.taken})

    def _threshold(self, index: int) -> float:
        """Return the share of a task's input energy that becomes used."""
        settings = self.settings
        done = min(index, settings.tasks - 1) / settings.tasks
        return settings.energy + (settings.last_energy - settings.energy) * done

    departures = (
        Departure(
            "design",
            "the right singular vectors of the inputs less their part in the used space: "
            "eigenvectors of P C P",
            "the left singular vectors of P C, eigenvectors of P C C P: directions also count by "
            "how much goes with them in the used space",
            "as in the paper, within a basis of the free space, so that rounding cannot leak",
        ),
        Departure(
            "energy",
            "squares of the inputs' singular values",
            "squares of the singular values of C, so their fourth powers: far fewer directions "
            "reach a threshold",
            "as in the paper",
        ),
        Departure(
            "first task",
            "enough directions to reach the threshold",
            "one direction fewer; at least one",
            "as in the paper",
        ),
        Departure(
            "threshold",
            "rises with the tasks",
            "from lamb to lame over the number of tasks, which is known beforehand",
            "over method.tasks tasks, for nobody knows how many will come; constant afterwards",
        ),
        Departure(
            "rows",
            "the new task's",
            "all of them, in training order",
            "method.rows of them, drawn by the task's seed and read one by one",
        ),
        Departure(
            "modules",
            "key and value of a vision transformer, which share A",
            "as in the paper",
            "whatever lora.targets says; modules that read the same tensor share A",
        ),
        Departure(
            "scale",
            "none",
            "A's rows have length 1/sqrt(3), the change is B A",
            "as released, times alpha/rank",
        ),
        Departure(
            "earlier adapters",
            "merged into the weights",
            "summed in every forward pass",
            "summed: one LoRA of rank t r under the live one",
        ),
    )
