"""How a step is driven: backward passes, clipping, the optimizer; alone, by DDP or by ZeRO.

The trainer says what the loss is; a drive makes gradients and a new set of weights of it. Its
optimizer's state goes into checkpoints under the same names whichever drive it is, so that a run
may go on under another one, or with another number of processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from treelora_cli.engine.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from treelora_cli.engine.world import World
from treelora_cli.errors import UsageError
from treelora_cli.methods.base import Method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch
from treelora_cli.models.forward import answer_logits
from treelora_cli.recipe import OptimSection

Kind = Literal["ddp", "zero1", "zero2", "fsdp2"]
ZERO: tuple[Kind, ...] = ("zero1", "zero2")

WORKS_UNDER_ZERO: frozenset[str] = frozenset({"penalty", "weights"})
"""What a method may need where gradients are sharded."""


class Drive(ABC):
    """Drives the steps of one task.

    Attributes:
        times: what a process's own loss is multiplied by, where gradients are averaged.
    """

    times: int = 1

    @abstractmethod
    def begin(self, lr: float) -> None:
        """Begin a step at a learning rate; no gradient is left."""

    @abstractmethod
    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Return ``answer_logits`` of a pass whose gradient is wanted.

        Args:
            batch: on the model's device.
            last: whether it is the last pass of the step; gradients of all are then reduced.
        """

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient."""

    @abstractmethod
    def step(self) -> Tensor:
        """Clip and move; return the gradient's norm before clipping, on the device."""

    def written(self) -> None:  # noqa: B027 - most keep no weights but the model's
        """Take up what a method has written into the trainable weights after a step."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state, as ``optimizer_tensors`` names it; asked of all at once."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put the optimizer's state back; the weights were put into the model before.

        Raises:
            RunDirError: the tensors are not those of these parameters.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the model."""


class PlainDrive(Drive):
    """One process: torch alone.

    Args:
        adapted: the model.
        optim: the recipe's ``optim`` section.
        rate: by what a parameter's learning rate is multiplied.
    """

    def __init__(
        self, adapted: AdaptedModel, optim: OptimSection, rate: Callable[[str], float]
    ) -> None:
        self.adapted = adapted
        self.parameters = adapted.parameters()
        self.optimizer = build_optimizer(adapted.trainable(), optim, rate)
        self._limit = optim.grad_clip or math.inf

    def begin(self, lr: float) -> None:
        """Begin a step."""
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)

    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Read a batch."""
        return answer_logits(self.adapted, batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        """Clip and move."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._limit)
        self.optimizer.step()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return AdamW's state."""
        return optimizer_tensors(self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put AdamW's state back."""
        load_optimizer_tensors(self.optimizer, tensors)


class IdleDrive(Drive):
    """Drives a task of no steps."""

    def begin(self, lr: float) -> None:
        """There is no step to begin."""
        raise RuntimeError("a method that trains nothing was asked for a step")

    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Nothing is trained on a batch."""
        raise RuntimeError("a method that trains nothing was asked for a step")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """There is no gradient."""
        raise RuntimeError("a method that trains nothing was asked for a step")

    def step(self) -> Tensor:
        """There is no step."""
        raise RuntimeError("a method that trains nothing was asked for a step")

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put nothing back."""


def make_drive(
    kind: Kind, adapted: AdaptedModel, method: Method, optim: OptimSection, world: World
) -> Drive:
    """Return what drives a task's steps.

    Raises:
        EnvironmentProblem: DeepSpeed is asked for and missing.
    """
    if not method.trains:
        return IdleDrive()
    if kind in ZERO:
        from treelora_cli.engine.drive_zero import ZeroDrive

        return ZeroDrive(adapted, optim, method.rate, world, stage=int(kind[-1]))
    if world.alone:
        return PlainDrive(adapted, optim, method.rate)
    if kind == "fsdp2":
        from treelora_cli.engine.drive_sharded import ShardedDrive

        return ShardedDrive(adapted, optim, method.rate, world)
    from treelora_cli.engine.drive_ddp import DdpDrive

    return DdpDrive(adapted, optim, method.rate, world)


def check_drive(kind: Kind, method: Method, world: World) -> None:
    """Check that a method can be driven so, before anything is loaded.

    Raises:
        UsageError: it needs what the drive does not have.
    """
    if kind == "ddp":
        return
    lacking = sorted(method.needs - WORKS_UNDER_ZERO) if kind in ZERO else []
    if lacking:
        raise UsageError(
            f"{method.name} needs {' and '.join(lacking)} of a step, which DeepSpeed's {kind} "
            "shards over the processes",
            "use --set processes.engine=ddp",
        )
    if world.alone:
        raise UsageError(
            f"processes.engine={kind} shares {'the optimizer' if kind in ZERO else 'the base'} out "
            "among processes; there is one",
            "add --nproc N, start with torchrun or deepspeed, or use processes.engine=ddp",
        )
