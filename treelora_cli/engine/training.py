"""Train the live adapter on one task: a plain loop around the method's hooks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treelora_cli.engine.drive import Kind, make_drive
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.optim import learning_rate
from treelora_cli.engine.seeds import derive
from treelora_cli.engine.share import StepShare, share_of
from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import DivergedError
from treelora_cli.methods.base import Method, StepContext, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.forward import answer_loss_of
from treelora_cli.models.probe import gradient_under
from treelora_cli.models.readback import Readback
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.recipe import OptimSection
from treelora_cli.rundir import faults

ADAPTER, OPTIMIZER, METHOD, RNG = "adapter.", "optimizer.", "method.", "rng."


# An accelerator works on while the host reads numbers that are this many steps old.
LAG = 2


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did; values are plain numbers.

    Attributes:
        step: the step, from 0.
        loss: mean over the answer tokens, before the step.
        penalty: what the method added, None where it added nothing.
        lr: learning rate.
        tokens: real tokens read.
        info: what the method reports.
    """

    step: int
    loss: float
    penalty: float | None
    lr: float
    tokens: int
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step whose numbers are on their way to the host: loss, gradient norm, perhaps penalty."""

    step: int
    lr: float
    tokens: int
    numbers: Readback
    info: dict[str, Any]

    def read(self) -> tuple[list[float], StepResult]:
        numbers = self.numbers.read()
        penalty = numbers[2] if numbers[2:] else None
        info = {
            key: value.read() if isinstance(value, Readback) else value
            for key, value in self.info.items()
        }
        return numbers, StepResult(self.step, numbers[0], penalty, self.lr, self.tokens, info)


class TaskTrainer:
    """Trains one task, step by step, from the start or from a checkpoint.

    No step waits for the device: its numbers are read ``LAG`` steps later, so a step that diverges
    is found out a little late, but before anything is stored.

    Args:
        adapted: the model; its live adapter is trained.
        method: already begun on this task.
        task: what is being trained.
        forwards: the task's batches, step by step.
        optim: the recipe's ``optim`` section.
        world: the processes that train together; each has this trainer.
        kind: how they do.

    Attributes:
        step: optimizer steps done.
        tokens: real tokens read in them.
        seconds: wall time they took.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        method: Method,
        task: TaskContext,
        forwards: Forwards,
        optim: OptimSection,
        world: World = ALONE,
        kind: Kind = "ddp",
    ) -> None:
        self.adapted = adapted
        self.method = method
        self.task = task
        self.forwards = forwards
        self.plan = forwards.plan
        self.optim = optim
        self.world = world
        self.spread = world.spread
        self.drive = make_drive(kind, adapted, method, optim, world)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._in_flight: deque[_InFlight] = deque()
        torch.manual_seed(task.seed)

    def run(self, on_result: Callable[[StepResult], None], after_step: Callable[[], None]) -> None:
        """Train to the last step.

        Args:
            on_result: given every step's result, in order, ``LAG`` steps after it or at a drain.
            after_step: called after every step, when ``self.step`` steps are done; may raise.

        Raises:
            DivergedError: a loss, penalty or gradient is not finite.
        """
        self.adapted.peft.train()
        try:
            while self.step < self.plan.steps:
                faults.hit("step")
                for result in self.advance():
                    on_result(result)
                after_step()
            for result in self.drain():
                on_result(result)
        finally:
            self.adapted.peft.eval()

    def advance(self) -> list[StepResult]:
        """Do one optimizer step; return the results that have become readable.

        The model must be in training mode, as ``run`` sets it.

        Raises:
            DivergedError: a loss, penalty or gradient of a step before is not finite.
        """
        started = time.perf_counter()
        self._in_flight.append(self._one_step())
        self.step += 1
        self.tokens += self._in_flight[-1].tokens
        results = self._results(LAG)
        self.seconds += time.perf_counter() - started
        return results

    def drain(self) -> list[StepResult]:
        """Wait for the device and return all results that were not returned yet.

        Raises:
            DivergedError: a loss, penalty or gradient is not finite.
        """
        started = time.perf_counter()
        results = self._results(0)
        self.seconds += time.perf_counter() - started
        return results

    def _results(self, left: int) -> list[StepResult]:
        results = []
        while len(self._in_flight) > left:
            numbers, result = self._in_flight.popleft().read()
            self._check_finite(result.step, numbers)
            results.append(result)
        return results

    def _one_step(self) -> _InFlight:
        lr = learning_rate(self.optim, self.step, self.plan.steps)
        if not self.world.alone:
            # Random numbers that depend on the step alone: whoever resumes draws the same ones.
            torch.manual_seed(derive(self.task.seed, "step", self.step, self.world.rank))
        self.drive.begin(lr)
        share = share_of(self.forwards, self.step, self.world).to(self.adapted.device)
        context, penalty = self._backward(share)
        self.method.after_backward(context)
        norm = self.drive.step()
        info = self.method.after_step(context)
        if "weights" in self.method.needs:
            self.drive.written()
        numbers = [context.loss, norm] if penalty is None else [context.loss, norm, penalty]
        return _InFlight(self.step, lr, share.tokens, Readback(torch.stack(numbers)), info)

    def _backward(self, share: StepShare) -> tuple[StepContext, Tensor | None]:
        """Add up the step's gradient.

        Returns:
            The step with its loss, and the sum of its penalties, detached, if there were any. Both
            are those of all processes.
        """
        passes = share.passes
        under = partial(self._under, share)
        losses: list[Tensor] = []
        penalties: list[Tensor] = []
        for number, one in enumerate(passes):
            last = number == len(passes) - 1
            self.method.before_forward(one.batch)
            logits = self.drive.logits(one.batch, last=last)
            part = answer_loss_of(logits, one.batch) / share.answer_tokens * one.counts
            losses.append(part.detach())
            loss = part * self.drive.times
            if self.method.per_forward:
                penalty = self._of_pass(share, number, logits, part.detach())
                if penalty is not None:
                    penalties.append(penalty.detach())
                    loss = loss + penalty * self.drive.times
            if last:
                step = StepContext(self.step, self._total(losses), gradient_under=under)
                if not self.method.per_forward:
                    # With the last loss: a backward pass of its own would cost more than this.
                    penalty = self.method.penalty(step)
                    if penalty is not None:
                        # Every process adds all of it, and averaging leaves it as it is.
                        penalties.append(penalty.detach() / self.drive.times)
                        loss = loss + penalty
            self.drive.backward(loss, last=last)
        return step, self._total(penalties) if penalties else None

    def _under(self, share: StepShare, snapshot: Snapshot) -> list[Tensor]:
        """Return the gradient of the step's rows at a snapshot's weights."""
        # Where passes must be alike, every process reads all rows of the step.
        own = (
            self.forwards.of(self.step)
            if self.world.sharded
            else [one.batch for one in share.passes if one.counts]
        )
        return gradient_under(self.adapted, own, snapshot, share.answer_tokens, self.spread)

    def _of_pass(
        self, share: StepShare, number: int, logits: Tensor, loss: Tensor
    ) -> Tensor | None:
        """Return a pass's penalty, counted with its share of the step's answer tokens.

        One that counts nothing is asked for all the same, so that a method sees as many passes on
        every process: what it draws from pass to pass stays alike.
        """
        one = share.passes[number]
        part = one.batch.answer_tokens / share.answer_tokens
        context = StepContext(
            self.step, loss / part, number, len(share.passes), batch=one.batch, logits=logits
        )
        penalty = self.method.penalty(context)
        return None if penalty is None else penalty * part * one.counts

    def _total(self, values: list[Tensor]) -> Tensor:
        """Return the sum over this step's passes and over all processes."""
        return self.world.sum(_sum(values).clone())

    def _check_finite(self, step: int, numbers: list[float]) -> None:
        for name, value in zip(("loss", "gradient norm", "penalty"), numbers, strict=False):
            if not math.isfinite(value):
                raise DivergedError(
                    f"task {self.task.name}: the {name} is {value} at step {step + 1} of "
                    f"{self.plan.steps}; nothing of it was stored",
                    "lower optim.lr, raise optim.warmup_steps or set optim.grad_clip",
                )

    def carry_on(self, optimizer: dict[str, Tensor]) -> None:
        """Start with the optimizer's state of the task before.

        Raises:
            RunDirError: it does not fit the model.
        """
        self.drive.load(optimizer)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything a resume inside the task needs: tensors and JSON values.

        Results must have been drained: what is stored is known to be finite.
        """
        if self._in_flight:
            raise RuntimeError("a checkpoint with results in flight would lose them")
        tensors = {ADAPTER + key: value for key, value in self.adapted.snapshot().items()}
        named = self.drive.tensors()
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
        self.drive.load(_part(tensors, OPTIMIZER))
        self.method.load_state(_part(tensors, METHOD), values["method"])
        torch.set_rng_state(tensors[RNG + "torch"])
        if RNG + "cuda" in tensors and self.adapted.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[RNG + "cuda"], self.adapted.device)
        self.step = int(values["step"])
        self.tokens = int(values["tokens"])
        self.seconds = float(values["seconds"])


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = tensors.items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}
