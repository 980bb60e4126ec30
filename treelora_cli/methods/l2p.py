"""L2P: a pool of soft prompts that all tasks share; each question chooses some of them by key.

Source: Wang et al., Learning to Prompt for Continual Learning (CVPR 2022, arXiv 2112.08654), Eq.
3-5. Pool {(k_m, P_m)}, m = 1..M, P_m of L soft tokens; a query q(x) takes the K keys nearest to it,
S(x) = top-K_m cos(q(x), k_m); the base reads [P_s for s in S(x); x]; the loss is

    cross-entropy + pull * sum_{s in S(x)} (1 - cos(q(x), k_s)).

The base and the LoRA stay frozen (B = 0), prompts and keys are trained. The same look-up is made
when questions are answered: no task has to be known. q(x) is the mean input embedding of the
prompt's tokens (``_prompts``). A prompt starts as the embeddings of random tokens, its key as their
mean.
Stored per task: the pool, M (L + 1) H numbers. Cost per step: K L more tokens to read, whatever
the number of tasks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from treelora_cli.methods._prompts import cosines, drawn_embeddings, mean_embedding
from treelora_cli.methods.base import Departure, Method, MethodSettings, StepContext, StreamContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.condition import Condition

Count = Annotated[int, Field(gt=0)]


class L2pSettings(MethodSettings):
    """L2P's own settings; the paper's values, but for the learning rate."""

    pool: Count = Field(10, description="prompts in the pool (the paper's M)")
    length: Count = Field(5, description="soft tokens of a prompt")
    top_k: Count = Field(5, description="prompts put before a question; TRACE's code: 3")
    pull: Annotated[float, Field(ge=0)] = Field(
        0.5, description="weight of the term that pulls the chosen keys to the query (lambda)"
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        300.0,
        description="learning rate of prompts and keys over optim.lr, which is LoRA's: "
        "the paper's 0.03 at the usual 1e-4",
    )

    @model_validator(mode="after")
    def _enough_prompts(self) -> L2pSettings:
        if self.top_k > self.pool:
            raise ValueError(f"top_k={self.top_k} prompts cannot be chosen of pool={self.pool}")
        return self


class Pool(Condition):
    """Puts the prompts whose keys are nearest before every question.

    Args:
        model: its embeddings make the queries.
        prompts: [M, L, H].
        keys: [M, H].
        top_k: how many are chosen, the nearest first.

    Attributes:
        distance: of the last batch, the mean over its rows of the chosen keys' summed 1 - cosine; a
            scalar in the graph.
    """

    def __init__(self, model: AdaptedModel, prompts: Tensor, keys: Tensor, top_k: int) -> None:
        self._model = model
        self._prompts = prompts
        self._keys = keys
        self._top_k = top_k
        self.width = top_k * prompts.shape[1]
        self.distance = torch.zeros(())

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the chosen prompts, [B, top_k L, H]."""
        queries = mean_embedding(self._model, ids, mask)
        nearest = cosines(queries, self._keys).topk(self._top_k, dim=1)
        self.distance = (1 - nearest.values).sum(1).mean()
        return self._prompts[nearest.indices].flatten(1, 2)


class L2p(Method):
    """A pool of soft prompts chosen by key (L2P), really read when questions are answered."""

    name = "l2p"
    needs = frozenset({"penalty"})
    answer = "more"
    per_forward = True
    Settings = L2pSettings
    settings: L2pSettings
    departures = (
        Departure(
            "answering",
            "the nearest prompts are put before every test row",
            "TRACE's test scripts call generate on the bare rows: no prompt is ever read",
            "the nearest prompts are put before every test row",
        ),
        Departure(
            "keys",
            "trained by the pull term",
            "the mean of each prompt as it was when the model was made",
            "start as that mean and are trained by the pull term",
        ),
        Departure(
            "query",
            "the frozen base's [CLS] feature",
            "mean input embedding, padding and answer included",
            "mean input embedding of the prompt's tokens",
        ),
        Departure(
            "choice in a batch",
            "each row its own prompts",
            "JAX and PyTorch code: the prompts most often chosen in a batch, for all of its rows; "
            "TRACE's: each row its own",
            "each row its own",
        ),
        Departure(
            "learning rate",
            "Adam, 0.03",
            "the LoRA or full fine-tuning rate, 1e-4 or 1e-5, in which prompts hardly move",
            "optim.lr times method.rate",
        ),
        Departure(
            "head",
            "a classifier is trained along",
            "none; the base answers in text",
            "none; the base answers in text",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Add the pool to the model, and stop training the adapter."""
        super().start(stream, model)
        model.freeze_adapter()
        own = self.settings
        drawn = drawn_embeddings(model, own.pool * own.length, stream.seed)
        drawn = drawn.view(own.pool, own.length, -1)
        prompts = model.add_part("prompts", drawn)
        keys = model.add_part("keys", drawn.mean(1))
        self.pool = Pool(model, prompts, keys, own.top_k)
        model.condition = self.pool

    def learns(self, key: str) -> bool:
        """No LoRA matrix and no base weight is trained."""
        return False

    def rate(self, key: str) -> float:
        """Return the learning rate of prompts and keys over that of the recipe."""
        return self.settings.rate

    def penalty(self, step: StepContext) -> Tensor:
        """Return the pull term of the rows that were just read."""
        return self.settings.pull * self.pool.distance
