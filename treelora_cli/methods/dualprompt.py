"""DualPrompt: a general soft prompt that all tasks share, and an expert prompt and a key per task.

Source: Wang et al., DualPrompt (ECCV 2022, arXiv 2204.04799), Eq. 3-6 and Algorithms 1 and 2.
While task t is trained, the base reads [E_t; G; x] and the loss is

    cross-entropy + match * (1 - cos(q(x), k_t)),

over G, E_t and k_t. When questions are answered, the key nearest to q(x) chooses the expert:
argmax_t cos(q(x), k_t); no task has to be known. q(x) is the mean input embedding of the prompt's
tokens (``_prompts``). The base and the LoRA stay frozen (B = 0). Earlier experts and keys stay as
they were, G goes on through all tasks. G and E_t start as the embeddings of random tokens, k_t as
the mean of E_t.
Stored per task: G, E_t and k_t. Cost per step: their tokens to read, whatever the number of tasks;
answering compares a query with every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.methods._prompts import cosines, drawn_embeddings, mean_embedding
from treelora_cli.methods.base import (
    Departure,
    Method,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.condition import Condition
from treelora_cli.models.snapshot import PART

GENERAL, EXPERT, KEY = "general", "expert", "key"
Count = Annotated[int, Field(gt=0)]


class DualPromptSettings(MethodSettings):
    """DualPrompt's own settings; the paper's values, but for the learning rate."""

    general: Count = Field(5, description="soft tokens that all tasks share; TRACE's code: 2")
    expert: Count = Field(20, description="soft tokens of a task's own; TRACE's code: 3")
    match: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the term that pulls the task's key to its queries (lambda)"
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        300.0,
        description="learning rate of prompts and key over optim.lr, which is LoRA's: "
        "L2P's 0.03 at the usual 1e-4",
    )


class Experts(Condition):
    """Puts an expert and the general prompt before every question.

    Args:
        model: its embeddings make the queries.
        general: [G, H].
        expert: [E, H], of the task being trained.
        key: [H], of the task being trained.

    Attributes:
        training: True while a task is trained: its own expert is put before its rows, whatever the
            keys say.
        experts: of all finished tasks, each [E, H].
        keys: of all finished tasks, each [H].
        distance: of the last batch, the mean of 1 - cosine over its rows: to the task's own key in
            training, to the nearest one when answering. A scalar, in the graph in training.
    """

    def __init__(self, model: AdaptedModel, general: Tensor, expert: Tensor, key: Tensor) -> None:
        self._model = model
        self._general = general
        self._expert = expert
        self._key = key
        self.width = len(general) + len(expert)
        self.training = False
        self.experts: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.distance = torch.zeros(())

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return each row's expert and the general prompt, [B, E + G, H]."""
        queries = mean_embedding(self._model, ids, mask)
        keys = self._key.unsqueeze(0) if self.training else torch.stack(self.keys)
        experts = self._expert.unsqueeze(0) if self.training else torch.stack(self.experts)
        nearest = cosines(queries, keys).max(dim=1)
        self.distance = (1 - nearest.values).mean()
        general = self._general.expand(len(ids), -1, -1)
        return torch.cat([experts[nearest.indices], general], dim=1)


class DualPrompt(Method):
    """A general and a task's own soft prompt, the latter chosen by key (DualPrompt)."""

    name = "dualprompt"
    needs = frozenset({"penalty"})
    answer = "more"
    per_forward = True
    Settings = DualPromptSettings
    settings: DualPromptSettings
    departures = (
        Departure(
            "where prompts stand",
            "prefix-tuning: keys and values of layers 1-2 (general) and 3-5 (expert)",
            "TRACE's code: embeddings before the text, the expert first",
            "embeddings before the text, the expert first",
        ),
        Departure(
            "answering",
            "the nearest key chooses the expert",
            "TRACE's test scripts call generate on the bare rows: no prompt is ever read; its keys "
            "are not trained, and its own evaluate is told the task",
            "the nearest key chooses the expert",
        ),
        Departure(
            "query",
            "the frozen base's [CLS] feature",
            "none",
            "mean input embedding of the prompt's tokens",
        ),
        Departure(
            "an expert's start",
            "at random",
            "PyTorch code: the expert of the task before; TRACE's: random tokens",
            "random tokens, by the task's seed; its key is their mean",
        ),
        Departure(
            "learning rate",
            "Adam, 0.005",
            "the LoRA or full fine-tuning rate, 1e-4 or 1e-5, in which prompts hardly move",
            "optim.lr times method.rate",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Add the prompts and the key to the model, and stop training the adapter."""
        super().start(stream, model)
        model.freeze_adapter()
        own = self.settings
        drawn = drawn_embeddings(model, own.general + own.expert, stream.seed)
        general, expert = drawn[: own.general], drawn[own.general :]
        self.expert = model.add_part(EXPERT, expert)
        self.key = model.add_part(KEY, expert.mean(0))
        self.experts = Experts(model, model.add_part(GENERAL, general), self.expert, self.key)
        model.condition = self.experts

    def learns(self, key: str) -> bool:
        """No LoRA matrix and no base weight is trained."""
        return False

    def rate(self, key: str) -> float:
        """Return the learning rate of prompts and key over that of the recipe."""
        return self.settings.rate

    def install(self, finished: Sequence[StoredTask]) -> None:
        """Let the keys of the finished tasks choose among their experts."""
        super().install(finished)
        held = self.experts
        held.training = False
        del held.experts[len(finished) :], held.keys[len(finished) :]
        for task in finished[len(held.keys) :]:
            stored = task.adapter()
            held.experts.append(stored[PART + EXPERT].to(self.model.device))
            held.keys.append(stored[PART + KEY].to(self.model.device))

    def begin_task(self, task: TaskContext) -> None:
        """Draw the task's expert and its key; the general prompt goes on."""
        drawn = drawn_embeddings(self.model, len(self.expert), task.seed)
        with torch.no_grad():
            self.expert.copy_(drawn)
            self.key.copy_(drawn.mean(0))
        self.experts.training = True

    def penalty(self, step: StepContext) -> Tensor:
        """Return the matching term of the rows that were just read."""
        return self.settings.match * self.experts.distance
