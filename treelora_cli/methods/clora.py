"""C-LoRA: a fresh LoRA for every task that keeps away from weights the earlier ones have changed.

Source: Smith et al., Continual Diffusion: Continual Customization of Text-to-Image Diffusion with
C-LoRA (TMLR 2024, arXiv 2304.06027), its self-regularisation, here for language models. Not meant
is C-LoRA of arXiv 2502.17920 (one adapter with a routing matrix). Task n trains B_n A_n on the
frozen sum of the earlier B_i A_i. Per optimizer step, from the second task on and summed over the
adapted modules, with * entry by entry:

    lambda || |s sum over i < n of B_i A_i| * (s B_n A_n) ||_F^2

s = alpha / rank as everywhere, so that both are changes of the weights, as in the paper, which has
no s.

Stored per task: the sum, one LoRA of rank n r. Cost: reading and answering add a LoRA of rank n r;
the penalty (n + 2) r d_in d_out multiplications a module and step: the sum of the changes is made
anew from its factors, some rows at a time, so that no memory of the weights' size is held.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.methods._products import product_penalty
from treelora_cli.methods._sums import Pair, SummedLora
from treelora_cli.methods.base import Departure, MethodSettings, StepContext


class CLoraSettings(MethodSettings):
    """C-LoRA's own settings."""

    strength: Annotated[float, Field(ge=0)] = Field(
        1e3,
        alias="lambda",
        description="weight of the squared products of changes; of equal norms they are smaller "
        "the wider a model is, so wide models want more",
    )


class CLora(SummedLora):
    """An incremental sum of LoRA adapters, each dear where earlier ones have changed much."""

    name = "clora"
    needs = frozenset({"penalty"})
    Settings = CLoraSettings
    settings: CLoraSettings

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return how much the live change falls on what was changed before."""
        if not self.past or not self.settings.strength:
            return None
        found = [
            product_penalty(live.A, live.B, partial(_collision, past))
            for past, live in zip(self.past, self.live, strict=True)
        ]
        # Both changes carry the scale, and their product is squared.
        return self.settings.strength * self.model.scale**4 * torch.stack(found).sum()

    departures = (
        Departure(
            "what is adapted",
            "keys and values of Stable Diffusion's cross-attention",
            "none found",
            "lora.targets",
        ),
        Departure(
            "prompts",
            "a learned token for every concept, and no word for the object",
            "none found",
            "the rows' own text alone",
        ),
        Departure(
            "scale",
            "a change is B A",
            "none found",
            "a change is s B A, s = alpha / rank: the weights' own; the penalty grows with s^4",
        ),
        Departure(
            "lambda",
            "1e8, for images",
            "none found",
            "1e3, chosen on the built-in tasks' eval rows; 1e6 left nothing to be learned there",
        ),
    )


def _collision(past: Pair, change: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the sum of (past change * change)^2 over some rows, and its derivative by the latter.

    Args:
        past: the factors of the earlier change.
        change: [rows, d_in], rows of the live one.
        rows: which ones.
    """
    weights = (past.B[rows] @ past.A).square()
    weighted = weights * change
    return (weighted * change).sum(), 2 * weighted
