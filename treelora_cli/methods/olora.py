"""O-LoRA: a fresh LoRA for every task, kept orthogonal to the subspaces of the earlier ones.

Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning (EMNLP
Findings 2023, arXiv 2310.14152), Eq. 6-8, and the released code. Task n trains B_n A_n on the
frozen sum of the earlier B_i A_i. Per optimizer step, summed over the adapted modules:

    lambda sum over i < n of sum over j, k of |(A_i A_n')_jk|^p + lambda2 (||A_n||_F + ||B_n||_F)

with p = 1 as released or p = 2 as printed. A rows [r, d_in] span what a task reads of its input;
only A_n gets a gradient of the first term.

Stored per task: the sum, one LoRA of rank n r. Cost: reading and answering add a LoRA of rank n r,
the penalty n r^2 d_in multiplications a module and step; all grow with the tasks.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.methods._sums import SummedLora
from treelora_cli.methods.base import Departure, MethodSettings, StepContext


class OLoraSettings(MethodSettings):
    """O-LoRA's own settings."""

    strength: Annotated[float, Field(ge=0)] = Field(
        0.5, alias="lambda", description="weight of the overlap with earlier tasks' A"
    )
    form: Literal["absolute", "squared"] = Field(
        "absolute",
        description="overlaps count by their absolute value, as in the released code, or by their "
        "square, as in the paper",
    )
    lambda2: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the norms of the live A and B (the released code's)"
    )


class OLora(SummedLora):
    """An incremental sum of LoRA adapters that read orthogonal parts of the input."""

    name = "olora"
    needs = frozenset({"penalty"})
    Settings = OLoraSettings
    settings: OLoraSettings

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return the overlap of the live A with all earlier ones, and the norms if asked for."""
        terms = []
        if self.past and self.settings.strength:
            terms.append(self.settings.strength * self._overlap())
        if self.settings.lambda2:
            terms.append(self.settings.lambda2 * self._norms())
        return torch.stack(terms).sum() if terms else None

    def _overlap(self) -> Tensor:
        found = []
        for past, live in zip(self.past, self.live, strict=True):
            overlap = past.A @ live.A.T
            size = overlap.abs() if self.settings.form == "absolute" else overlap.square()
            found.append(size.sum())
        return torch.stack(found).sum()

    def _norms(self) -> Tensor:
        factors = [factor for pair in self.live for factor in (pair.A, pair.B)]
        return torch.stack([torch.linalg.vector_norm(factor) for factor in factors]).sum()

    departures = (
        Departure(
            "overlap",
            "sum of squares of A_i A_n'",
            "sum of absolute values",
            "as released; form=squared is the paper's",
        ),
        Departure(
            "norms of A and B",
            "none",
            "lambda2 times their sum, not squared; 0 but for some tasks of the 15-task order",
            "lambda2, 0 by default",
        ),
        Departure(
            "lambda",
            "0.5",
            "a number for every task of the 15-task order (0, then 0.5, then 5)",
            "one number",
        ),
        Departure(
            "several passes a step",
            "not said",
            "the whole penalty in every forward pass: more of it where gradients are accumulated",
            "once an optimizer step",
        ),
        Departure(
            "dropout",
            "not said",
            "the frozen sum reads the live adapter's dropped inputs",
            "the frozen sum reads all of its input",
        ),
        Departure(
            "prompts",
            "no task identity at test time",
            "name the task and the data set",
            "the rows' own text alone",
        ),
    )
