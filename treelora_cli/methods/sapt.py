"""SAPT: a LoRA per task, all kept; attention over their keys weighs them for every prompt.

Source: Zhao et al., SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning
of Large Language Models (ACL 2024, arXiv 2401.08295), its shared attentive learning and selection,
with the released code where the paper leaves things open. In task n a module gives, for a row x,

    W h + s sum_i a_i(x) B_i A_i h,   a(x) = softmax_i(q(x) . k_i / (temperature sqrt(H))),

over i = 1..n, the same weights in all modules, for the prompt and for every token of its answer.
q(x) = norm(silu(W_up W_down e(x))), with e(x) the mean input embedding of the prompt's tokens
(``_prompts``), brought to a root mean square of 1 because models scale their embeddings
differently. B_n A_n, k_n, W_up and W_down are trained; earlier adapters and keys are frozen. Loss:
mean cross-entropy of the answer tokens. The same weights are computed when questions are answered:
no task has to be known, and none is told.

What keeps attention where it was is missing here: the paper replays pseudo-samples that a
generator made of earlier tasks (its attentive reflection). Without them nothing in the loss tells
their prompts from the new task's: the new key draws all prompts or none, and ``effect``, the
attention left to earlier tasks, shows which.
Stored per task: all adapters so far as one of rank n r, the projection, and the task's key. Cost
per step: a LoRA of rank n r, in training and when answering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from treelora_cli.errors import UsageError
from treelora_cli.methods._prompts import mean_embedding
from treelora_cli.methods._sums import SummedLora
from treelora_cli.methods.base import (
    EFFECT,
    Departure,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
)
from treelora_cli.models.adapted import PAST, SLOT, AdaptedModel
from treelora_cli.models.condition import Condition
from treelora_cli.models.readback import Readback
from treelora_cli.models.snapshot import PART

DOWN, UP, KEY = "query.down", "query.up", "key"


class SaptSettings(MethodSettings):
    """SAPT's own settings."""

    width: Annotated[int, Field(gt=0)] = Field(
        100, description="width between the two matrices of the query projection"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the attention over tasks, in units of the root of the keys' width"
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="learning rate of key and query projection over LoRA's"
    )


class SharedAttention(Condition):
    """Weighs the adapters of all tasks by each row's prompt.

    Forward hooks on PEFT's ``lora_A`` modules scale what a task's r rows give. The weights stand
    from one ``read`` to the next: for all layers, for encoder and decoder, and for every token that
    is generated, whose batch keeps the rows of the prompts.

    Args:
        model: with the live adapter, and perhaps a frozen one under it.
        down: [D, H].
        up: [H, D].
        key: [H], that of the task being trained.
        temperature: in units of sqrt(H).

    Attributes:
        training: True while a task is trained: the live adapter takes part, with ``key``.
        keys: of all finished tasks, each [H].
        weights: of the last batch, float32 [B, finished tasks + 1]; the live adapter's is the last
            one, 0 when answering.
    """

    def __init__(
        self, model: AdaptedModel, down: Tensor, up: Tensor, key: Tensor, temperature: float
    ) -> None:
        self._model = model
        self._down = down
        self._up = up
        self._key = key
        self._temperature = temperature
        self.training = False
        self.keys: list[Tensor] = []
        self.weights = torch.ones(1, 1)
        self.watch(SLOT)

    def watch(self, adapter: str) -> None:
        """Scale what an adapter gives from now on; its modules are new after ``stand_on``."""
        for name, module in self._model.peft.named_modules():
            if name.endswith(f".lora_A.{adapter}"):
                module.register_forward_hook(partial(self._scale, adapter))

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Compute the rows' weights; there are no soft prompts."""
        query = self.query(mean_embedding(self._model, ids, mask))
        keys = torch.stack([*self.keys, self._key] if self.training else self.keys)
        scores = query @ keys.T / (self._temperature * math.sqrt(keys.shape[1]))
        weights = scores.softmax(dim=1)
        self.weights = weights if self.training else functional.pad(weights, (0, 1))

    def query(self, embedded: Tensor) -> Tensor:
        """Return the queries of mean embeddings, both [B, H]."""
        width = embedded.shape[1]
        evened = functional.normalize(embedded, dim=1) * math.sqrt(width)
        projected = functional.silu(evened @ self._down.T @ self._up.T)
        return functional.layer_norm(projected, (width,))

    def _scale(self, adapter: str, module: Any, inputs: Any, output: Tensor) -> Tensor:
        """Scale [B, S, rank], the rows of one task after those of another."""
        weights = self.weights[:, -1:] if adapter == SLOT else self.weights[:, :-1]
        if output.dim() != 3 or len(output) != len(weights):
            raise UsageError(
                f"sapt weighs adapters by row, but an adapted module gives {tuple(output.shape)} "
                f"for {len(weights)} prompts",
                "adapt other modules with lora.targets, or use another method",
            )
        each = weights.repeat_interleave(output.shape[2] // weights.shape[1], dim=1)
        return output * each.unsqueeze(1).to(output.dtype)


class Sapt(SummedLora):
    """An attentive mixture of every task's LoRA, weighed by the prompt (SAPT without replay)."""

    name = "sapt"
    answer = "more"
    Settings = SaptSettings
    settings: SaptSettings
    departures = (
        Departure(
            "attentive reflection",
            "KL of the attention on pseudo-samples of earlier tasks to what it was",
            "with pseudo-samples of a generator that is trained per task",
            "none: no pseudo-samples are generated, and no rows are kept",
        ),
        Departure(
            "what the query is made of",
            "the pooled embedding of the input",
            "the maximum over its tokens, scaled as the model has it",
            "the mean over its tokens, at a root mean square of 1",
        ),
        Departure(
            "layer norm of the query",
            "after the projection",
            "with a trained gain and offset",
            "without: a key can scale its own coordinates",
        ),
        Departure(
            "keys at the start",
            "not said",
            "uniform in -1..1",
            "uniform in -1..1, by the task's seed",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Add query projection and key to the model."""
        super().start(stream, model)
        hidden = int(model.backbone.model.get_input_embeddings().weight.shape[1])
        generator = torch.Generator().manual_seed(stream.seed)
        shapes = {DOWN: (self.settings.width, hidden), UP: (hidden, self.settings.width)}
        parts = {}
        for name, shape in shapes.items():
            # As torch starts a linear layer.
            drawn = torch.empty(shape)
            torch.nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator)
            parts[name] = model.add_part(name, drawn)
        self.key = model.add_part(KEY, torch.zeros(hidden))
        self.attention = SharedAttention(
            model, parts[DOWN], parts[UP], self.key, self.settings.temperature
        )
        model.condition = self.attention

    def install(self, finished: Sequence[StoredTask]) -> None:
        """Freeze all adapters, and let the keys of their tasks weigh them."""
        super().install(finished)
        held = self.attention
        held.training = False
        held.watch(PAST)
        del held.keys[len(finished) :]
        for task in finished[len(held.keys) :]:
            held.keys.append(task.adapter()[PART + KEY].to(self.model.device))

    def begin_task(self, task: TaskContext) -> None:
        """Draw the task's adapter and key; the projection goes on."""
        super().begin_task(task)
        generator = torch.Generator().manual_seed(task.seed)
        with torch.no_grad():
            self.key.copy_(torch.rand(self.key.shape, generator=generator) * 2 - 1)
        self.attention.training = True

    def rate(self, key: str) -> float:
        """Return the learning rate of a parameter over that of the recipe."""
        return self.settings.rate if key.startswith(PART) else 1.0

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Report how much of the attention is on earlier tasks, in the step's last batch."""
        if not self.attention.keys:
            return {}
        return {EFFECT: Readback(self.attention.weights[:, :-1].sum(1).mean())}
