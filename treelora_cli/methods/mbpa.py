"""MbPA++: sparse replay in training, and a short adaptation to near rows before every answer.

Source: de Masson d'Autume, Ruder, Kong, Yogatama: Episodic Memory in Lifelong Language Learning
(NeurIPS 2019, arXiv 1906.01076), with the adapter in place of the model's own weights.

Training goes on from task to task; every ``every``-th step of a task, the first included, is
joined by as many rows of earlier tasks as it has of its own. For an answer the K stored rows whose
keys are nearest to the question's (Euclidean) are taken, the adapter w makes L gradient steps from
where training left it, w*,

    w <- w - rate * grad( mean loss of the K rows + anchor * |w - w*|^2 ),

the question is answered, and w* is put back. Keys are what the frozen base makes of a prompt
(``models.features``); nothing of an answer depends on which other questions are asked.

Stored per task: a share of its rows, tokenised, with a key of at most 512 numbers each. Cost:
training: that of plain LoRA, a percent more; every answer: one pass of the base over at most 256
tokens, and training on K rows L times over. Questions are answered one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.methods._memory import Memory, sample_rows
from treelora_cli.methods._replay import joined_loss
from treelora_cli.methods.base import (
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
from treelora_cli.models.condition import Condition
from treelora_cli.models.encode import Batch, Example, collate
from treelora_cli.models.features import token_features
from treelora_cli.models.grouping import group_by_length
from treelora_cli.models.probe import mean_gradient

KEYS = "keys"
PASS_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most tokens of a forward pass of the adaptation, as in training."""


class MbpaSettings(MethodSettings):
    """MbPA++'s own settings."""

    memory: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of a task's training rows that is kept; the paper: all"
    )
    every: Annotated[int, Field(gt=0)] = Field(
        100, description="one step in so many replays stored rows; the paper: 1 % of the rows"
    )
    neighbours: Annotated[int, Field(gt=0)] = Field(
        16, description="K, stored rows an answer is prepared with; the paper: 32, TRACE: 16"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        10, description="L, gradient steps on them; the paper: 30, TRACE: 10; 0: none"
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        5e-3, description="step size of these; the paper: 5e-3, for questions on a text 1e-3"
    )
    anchor: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="weight of the squared distance from the trained adapter"
    )


class LocalAdaptation(Condition):
    """Adapts the live adapter to the stored rows nearest to a question, while it is answered.

    Args:
        model: its live adapter is adapted.
        settings: the method's.
    """

    rows = 1

    def __init__(self, model: AdaptedModel, settings: MbpaSettings) -> None:
        self._model = model
        self._settings = settings
        self.memory: list[Example] = []
        self.keys = torch.zeros(0, 0)

    def remember(self, rows: Sequence[Example], keys: Tensor) -> None:
        """Take these rows for the whole memory.

        Args:
            rows: in the order of their keys.
            keys: float32 [rows, width] on the host.
        """
        self.memory, self.keys = list(rows), keys

    @contextmanager
    def answering(self, ids: Tensor, mask: Tensor) -> Iterator[None]:
        """Adapt to one question; afterwards the weights are as before, bit for bit."""
        if len(ids) != 1:
            raise ValueError(f"{len(ids)} questions at once cannot be adapted to")
        if not self.memory or not self._settings.steps:
            yield
            return
        parameters = self._model.parameters()
        trained = [parameter.detach().clone() for parameter in parameters]
        try:
            # Generation reads without a graph; these steps need one.
            with torch.inference_mode(False), torch.enable_grad():
                self._adapt(self.nearest(ids[0][mask[0].bool()].tolist()), trained)
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, trained, strict=True):
                    parameter.copy_(before)

    def nearest(self, prompt: Sequence[int]) -> list[Example]:
        """Return the K rows whose keys are nearest to a prompt's, the nearest first.

        Args:
            prompt: its tokens.
        """
        key = token_features(self._model, [prompt])
        distances = (self.keys - key).square().sum(dim=1)
        order = distances.sort(stable=True).indices[: self._settings.neighbours]
        return [self.memory[at] for at in order.tolist()]

    def _adapt(self, rows: Sequence[Example], trained: Sequence[Tensor]) -> None:
        settings, parameters = self._settings, self._model.parameters()
        batches = self._batches(rows)
        for _ in range(settings.steps):
            gradient = mean_gradient(self._model, batches)
            with torch.no_grad():
                for parameter, slope, before in zip(parameters, gradient, trained, strict=True):
                    pull = 2 * settings.anchor * (parameter - before)
                    parameter.sub_(settings.rate * (slope + pull))

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        model = self._model
        limit = PASS_TOKENS.get(model.device.type, PASS_TOKENS["cuda"])
        groups = group_by_length([len(row.tokens) for row in rows], len(rows), limit)
        pad = model.backbone.tokenizer.pad_token_id
        return [collate([rows[at] for at in group], pad).to(model.device) for group in groups]


class Mbpa(Method):
    """Sparse replay, and local adaptation to stored rows before every answer."""

    name = "mbpa"
    needs = frozenset({"penalty"})
    answer = "more"
    Settings = MbpaSettings
    settings: MbpaSettings
    departures = (
        Departure(
            "what is trained and adapted",
            "all weights of BERT",
            "all weights (TRACE), by the trainer's own optimizer, whose state changes with it",
            "the LoRA adapter, by plain gradient steps that leave no trace",
        ),
        Departure(
            "key of a row",
            "the first token's state in a second, frozen BERT",
            "TRACE: the state at position 0, behind left padding: nearly the same for all rows",
            "means and last state of the frozen base's middle and last layers",
        ),
        Departure(
            "sparse replay",
            "100 rows after every 10,000 new ones, a step of their own",
            "TRACE: nearly never, since a step within an epoch is compared with all epochs' steps",
            "as many rows as a step has, joined to its loss, in one step of a hundred",
        ),
        Departure(
            "neighbours and local steps",
            "K = 32, L = 30",
            "TRACE: K = 16, L = 10, and the memory holds batches",
            "TRACE's, for each costs a pass over K rows; the memory holds rows",
        ),
        Departure(
            "likelihood of the neighbours",
            "summed over a row's answer, averaged over rows",
            "averaged over tokens",
            "averaged over answer tokens, as in training",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with no memory, and let every answer be prepared."""
        super().start(stream, model)
        self.local = LocalAdaptation(model, self.settings)
        model.condition = self.local

    def install(self, finished: Sequence[StoredTask]) -> None:
        """Take up the last adapter and the rows of all these tasks.

        Raises:
            RunDirError: a task's rows or keys are missing or damaged.
        """
        super().install(finished)
        memories = [Memory.from_tensors(task.memory.tensors, task.name) for task in finished]
        keys = [_keys(task, memory) for task, memory in zip(finished, memories, strict=True)]
        self.local.remember([row for memory in memories for row in memory.rows], torch.cat(keys))

    def begin_task(self, task: TaskContext) -> None:
        """Go on from the last task's weights."""
        self.task = task

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return the loss of stored rows in a step that replays."""
        if not self.local.memory or step.step % self.settings.every:
            return None
        return joined_loss(self.task, self.local.memory, 1.0, step.step)

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Keep rows with their keys."""
        count = max(1, round(self.settings.memory * len(task.rows)))
        memory = Memory(sample_rows(task.rows, count, task.seed))
        prompts = [row.tokens[: row.answer_start] for row in memory.rows]
        keys = {KEYS: token_features(self.model, prompts)}
        return TaskMemory(memory.tensors() | keys, {"rows_kept": len(memory)})


def _keys(task: StoredTask, memory: Memory) -> Tensor:
    found = task.memory.tensors.get(KEYS)
    if found is None or found.dim() != 2 or len(found) != len(memory):
        raise RunDirError(
            f"the stored keys of task {task.name} are damaged or missing",
            "put the task's method.safetensors back, or start a new run",
        )
    return found
