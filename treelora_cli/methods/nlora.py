"""N-LoRA: a fresh LoRA for every task whose change of the weights is kept sparse.

Source: Yang et al., Is Parameter Collision Hindering Continual Learning in LLMs? (COLING 2025,
arXiv 2410.10179). Task n trains B_n A_n on the frozen sum of the earlier B_i A_i. Two tasks collide
in an entry that both change; the sparser the changes, the fewer collide. Per optimizer step, from
the first task on and summed over the adapted modules:

    lambda ||B_n A_n||_1                (the paper's A B, in PEFT's order of the factors)

with no scale in front of B A, as in the released code. A subgradient makes few entries exactly
zero, but most of them small.

Stored per task: the sum, one LoRA of rank n r. Cost: reading and answering add a LoRA of rank n r,
which grows with the tasks; the penalty 3 r d_in d_out multiplications a module and step, which does
not, and no memory of the weights' size (see ``_products``).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.methods._products import product_penalty
from treelora_cli.methods._sums import SummedLora
from treelora_cli.methods.base import Departure, MethodSettings, StepContext, StreamContext
from treelora_cli.models.adapted import AdaptedModel


class NLoraSettings(MethodSettings):
    """N-LoRA's own settings."""

    strength: Annotated[float, Field(ge=0)] = Field(
        1e-3,
        alias="lambda",
        description="weight of the L1 norm; the scripts' 0.4 to 1.8 belong to product=AB, a sum of "
        "far fewer entries",
    )
    product: Literal["BA", "AB"] = Field(
        "BA",
        description="what the norm is of: the change of the weights, as in the paper, or the "
        "released code's [r, r] product, which needs modules with as many inputs as outputs",
    )


class NLora(SummedLora):
    """An incremental sum of LoRA adapters that each change few weights."""

    name = "nlora"
    needs = frozenset({"penalty"})
    Settings = NLoraSettings
    settings: NLoraSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Meet the model.

        Raises:
            UsageError: ``product=AB``, and a module has not as many inputs as outputs.
        """
        super().start(stream, model)
        for module, A, B in self.live if self.settings.product == "AB" else []:
            if A.shape[1] != B.shape[0]:
                raise UsageError(
                    f"method.product=AB needs modules with as many inputs as outputs, but "
                    f"{module} has {A.shape[1]} and {B.shape[0]}",
                    "use method.product=BA, or lora.targets whose modules are square",
                )

    def penalty(self, step: StepContext) -> Tensor | None:
        """Return the L1 norm of the live product over all modules."""
        if not self.settings.strength:
            return None
        norm = _change if self.settings.product == "BA" else _inner
        norms = [norm(pair.A, pair.B) for pair in self.live]
        return self.settings.strength * torch.stack(norms).sum()

    departures = (
        Departure(
            "the norm",
            "of the change of the weights, B A",
            "of A B, [r, r]: not the change, and only where d_in = d_out",
            "the paper's; product=AB is as released",
        ),
        Departure(
            "lambda",
            "a number",
            "0.4 for orders 1-3; 0.4 or 1.2 by task, 0.55 and 1.8 for orders 4, 5 and 6: for a sum "
            "over [r, r], which hardly grows with the model",
            "one number for a sum over [d_out, d_in]: 1e-3, picked on built-in tasks' eval rows",
        ),
        Departure(
            "end of a task",
            "the adapter is merged into the base",
            "adapters are summed",
            "adapters are summed: the same weights, and the base stays as it was",
        ),
        Departure(
            "epochs",
            "not said",
            "10 a task, O-LoRA's has 1: comparisons are not at equal epochs",
            "optim.epochs",
        ),
        Departure(
            "dropout",
            "not said",
            "the frozen sum reads the live adapter's dropped inputs",
            "the frozen sum reads all of its input",
        ),
    )


def _change(A: Tensor, B: Tensor) -> Tensor:
    """Return the L1 norm of B A."""
    return product_penalty(A, B, lambda change, _: (change.abs().sum(), change.sign()))


def _inner(A: Tensor, B: Tensor) -> Tensor:
    """Return the L1 norm of A B."""
    return (A @ B).abs().sum()
