"""I-LoRA: a fast adapter learns, a slow one follows it as its running mean and steadies it.

Source: Ren et al.: Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning
(ICASSP 2025, arXiv 2402.18865), and the released code (which47/LLMCL, ``method/ILORA.py``). Sure,
from abstract and code: two memories, a working one that is trained and a long-term one that is the
exponential moving average of it, interpolated entry by entry; a buffer of 500 rows; the mean of the
losses of new rows and of as many rows of the buffer, plus the mean squared difference of the two
memories' hidden states on the latter. Not sure, for the code is at odds with itself: the decay, and
which of the two answers. Both are settings; ``treelora methods ilora`` tells what the code does.

With f the fast and s the slow adapter's matrices, per optimizer step, n counted over the stream:

    L = (L_new(f) + L_old(f)) / 2 + consistency mean |h(f) - h(s)|^2
    s <- a s + (1 - a) f,    a = min(1 - 1 / (n + 1), decay)

L_old and h on rows drawn from a sample of all earlier tasks' rows (reservoir), h what the output
layer reads where answers are predicted. In the first task there are no such rows: L = L_new. The
fast adapter goes on from task to task.

Stored per task: the adapter that answers, the other one, and the sample. Cost per step: a forward
and backward pass over the drawn rows, and one more forward pass, whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.methods._memory import Memory, draw, reservoir
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
from treelora_cli.models.encode import IGNORED, Batch
from treelora_cli.models.forward import answer_logits, answer_loss_of
from treelora_cli.models.hidden import answer_hidden, require_output_layer
from treelora_cli.models.readback import Readback
from treelora_cli.models.snapshot import Snapshot

OTHER = "other."
"""Before the keys of the adapter that does not answer, among the tensors a task stores."""

SEEN, AVERAGED = "rows_seen", "steps_averaged"


class ILoraSettings(MethodSettings):
    """I-LoRA's own settings."""

    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9,
        description="share of the slow adapter that stays at every step: it is the mean of some "
        "1/(1-decay) last steps, which should be fewer than a task has; the released code: 0.25",
    )
    consistency: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the squared difference of fast and slow"
    )
    compare: Literal["hidden", "logits"] = Field(
        "hidden", description="what of fast and slow is compared, where answers are predicted"
    )
    answers: Literal["slow", "fast"] = Field("slow", description="which adapter answers")
    memory: Annotated[int, Field(gt=0)] = Field(
        500, description="rows held in all, a sample of all earlier tasks' rows"
    )
    drawn: Annotated[int, Field(gt=0)] | None = Field(
        None, description="rows drawn for each step; nothing: as many as a step has of its own"
    )


class ILora(Method):
    """A LoRA adapter trained with replay, steadied by its own running mean."""

    name = "ilora"
    needs = frozenset({"gradients"})
    Settings = ILoraSettings
    settings: ILoraSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with no rows and nothing averaged.

        Raises:
            UsageError: hidden states are to be compared and the model does not show them.
        """
        super().start(stream, model)
        if self.settings.compare == "hidden":
            require_output_layer(model)
        self.rows = Memory([])
        self.seen = 0
        self.averaged = 0
        self.other: Snapshot | None = None
        self.observed: dict[str, Any] = {}

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Read the sample and the adapter that did not answer.

        Raises:
            RunDirError: something of it is missing or damaged.
        """
        if not finished:
            return
        last = finished[-1]
        self.rows = Memory.from_tensors(last.memory.tensors, last.name)
        self.other = {
            key.removeprefix(OTHER): value
            for key, value in last.memory.tensors.items()
            if key.startswith(OTHER)
        }
        info = last.memory.info
        missing = [key for key in (SEEN, AVERAGED) if key not in info]
        if missing or not self.other:
            raise RunDirError(
                f"task {last.name} was stored without {(missing or ['its second adapter'])[0]}",
                "put its folder back from a copy, or start a new run",
            )
        self.seen, self.averaged = int(info[SEEN]), int(info[AVERAGED])

    def begin_task(self, task: TaskContext) -> None:
        """Go on with the fast adapter where it was, and with the slow one beside it."""
        self.task = task
        answering = self.model.snapshot()
        other = answering if self.other is None else self.other
        slow, fast = (answering, other) if self.settings.answers == "slow" else (other, answering)
        self.model.restore(fast)
        self.slow = self._on_device(slow)
        wanted = self.settings.drawn or round(len(task.rows) / task.steps_per_epoch)
        self.drawn = max(1, wanted)

    def _on_device(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: snapshot[key].to(parameter.device, parameter.dtype, copy=True)
            for key, parameter in self.model.trainable().items()
        }

    def after_backward(self, step: StepContext) -> None:
        """Add the gradient of the rows of the sample."""
        self.observed = {}
        if not len(self.rows):
            return
        drawn = draw(self.rows.rows, self.drawn, self.task.seed, step.step)
        batches = self.task.ask.batches(drawn)
        with self._being_slow():
            targets = [self._shown(batch) for batch in batches]
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        tokens = sum(batch.answer_tokens for batch in batches)
        apart = []
        for batch, target in zip(batches, targets, strict=True):
            shown, logits = self._read(batch)
            apart.append(squared_difference(shown, target, batch) / tokens)
            loss = (
                answer_loss_of(logits, batch) / tokens / 2 + self.settings.consistency * apart[-1]
            )
            loss.backward()  # type: ignore[no-untyped-call]
        difference = torch.stack([part.detach() for part in apart]).sum()
        self.observed = {EFFECT: len(drawn), "consistency": Readback(difference)}

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what of a batch is compared, [n, d], and its logits, [n, vocabulary]."""
        if self.settings.compare == "hidden":
            return answer_hidden(self.model, batch)
        logits = answer_logits(self.model, batch)
        return logits, logits

    def _shown(self, batch: Batch) -> Tensor:
        """Return what of a batch is compared, without dropout and outside the graph."""
        with torch.no_grad(), self.model.evaluating():
            return self._read(batch)[0]

    @contextmanager
    def _being_slow(self) -> Iterator[None]:
        """Put the slow adapter into the model for a while; on the device, no host waits for it."""
        parameters = self.model.trainable()
        fast = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        _put(parameters, self.slow)
        try:
            yield
        finally:
            _put(parameters, fast)

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Let the slow adapter follow; report how many rows of the sample were read."""
        self.averaged += 1
        kept = min(1 - 1 / (self.averaged + 1), self.settings.decay)
        for key, parameter in self.model.trainable().items():
            self.slow[key].lerp_(parameter.detach(), 1 - kept)
        return self.observed

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Leave the adapter that answers in the model; keep the other one and the sample."""
        sample = reservoir(self.rows.rows, self.seen, task.rows, self.settings.memory, task.seed)
        self.rows = Memory(sample)
        self.seen += len(task.rows)
        fast = self.model.snapshot()
        slow = fast | {key: value.to("cpu", torch.float32) for key, value in self.slow.items()}
        answering, self.other = (slow, fast) if self.settings.answers == "slow" else (fast, slow)
        self.model.restore(answering)
        tensors = self.rows.tensors() | {OTHER + key: value for key, value in self.other.items()}
        return TaskMemory(tensors, {SEEN: self.seen, AVERAGED: self.averaged})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the slow adapter and how many steps it is the mean of."""
        return {key: value.cpu() for key, value in self.slow.items()}, {"averaged": self.averaged}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.slow = self._on_device(tensors)
        self.averaged = int(values["averaged"])

    departures = (
        Departure(
            "slow adapter",
            "the moving average of the fast one",
            "a second PEFT adapter; its update compares names that hold the adapter's own, so it "
            "averages the fast one with itself: the slow one stays at its random start, which "
            "changes nothing of the base",
            "the moving average",
        ),
        Departure(
            "decay",
            "not sure",
            "0.25, from the second step of every task on: hardly slow",
            "0.9, some ten steps; the mean of all steps where there were fewer",
        ),
        Departure(
            "consistency",
            "mean squared difference",
            "of the fast hidden states and the larger, entry by entry, of fast and slow: no pull "
            "where the fast one is larger",
            "mean squared difference",
        ),
        Departure(
            "hidden states",
            "embeddings; not sure of which layers",
            "of all layers, at all tokens, padding too",
            "what the output layer reads, where answers are predicted; or logits",
        ),
        Departure(
            "buffer",
            "rows of earlier tasks",
            "reservoir of 500 that the present task's rows enter as they are read, drawn from in "
            "all but the first task; padded on the left with token 0, labels too",
            "reservoir of 500 over the finished tasks' rows",
        ),
        Departure(
            "who answers",
            "not sure",
            "the fast one is saved; after that the script stops, for it calls load_ema_model, "
            "which does not exist",
            "the slow one; method.answers=fast for the other",
        ),
    )


def squared_difference(shown: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Return the squared difference, averaged over entries and summed over answer tokens.

    Args:
        shown: [n, d], in the graph.
        target: [n, d].
        batch: whose answers they predict; positions that only fill up do not count.
    """
    apart = (shown.float() - target.float()).square().mean(dim=1)
    return (apart * (batch.labels != IGNORED)).sum()


def _put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
