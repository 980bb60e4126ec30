"""SeqFT: all weights of the base trained on task after task, nothing done against forgetting.

Source: the sequential full fine-tuning of TRACE (Wang et al., 2023) and of O-LoRA's benchmark
(Wang et al., EMNLP Findings 2023). Loss: mean cross-entropy of the answer tokens. The adapter is
frozen at B = 0 and adds nothing. Both benchmarks train whole models with a tenth of LoRA's
learning rate (1e-5 against 1e-4), so ``optim.lr`` is multiplied by ``rate`` = 0.1.

Cost, P the entries of the base, constant in the number of tasks: memory 16 P bytes on the device
(weights, gradients and two Adam moments in float32) and 4 P on the host (the weights as they came,
for zero-shot scores and routing features); 4 P bytes stored per task, 12 P per checkpoint. For 7
billion entries that is 112 GB, 28 GB, 28 GB and 84 GB. A base in half precision or quantised is
refused: steps this small are lost in its rounding.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import Departure, Method, MethodSettings, StreamContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.snapshot import WEIGHTS


class SeqFtSettings(MethodSettings):
    """SeqFT's own settings."""

    rate: Annotated[float, Field(gt=0)] = Field(
        0.1, description="optim.lr is multiplied by it: the papers' 1e-5 against 1e-4 for LoRA"
    )


class SeqFt(Method):
    """Sequential fine-tuning of all weights of the base."""

    name = "seqft"
    needs = frozenset({"weights"})
    answer = "more"
    Settings = SeqFtSettings
    settings: SeqFtSettings
    departures = (
        Departure(
            "optimizer at a task's start",
            "not said",
            "TRACE carries Adam's moments on, O-LoRA's benchmark starts a new process",
            "new for every task; optim.carry=true carries on",
        ),
        Departure(
            "precision",
            "bfloat16 under ZeRO, which trains float32 copies",
            "as the paper",
            "float32 throughout; a base in half precision is refused",
        ),
    )

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Open every weight of the base and freeze the adapter.

        Raises:
            UsageError: the base is quantised or in half precision.
        """
        super().start(stream, model)
        if getattr(model.backbone.model.config, "quantization_config", None) is not None:
            raise UsageError(
                "seqft trains every weight of the base, and this one is quantised",
                "use a base in floating point, or a method that trains LoRA only",
            )
        model.open_weights(lambda name: True)
        model.freeze_adapter()

    def learns(self, key: str) -> bool:
        """Tell what is trained: the base's weights alone."""
        return key.startswith(WEIGHTS)

    def rate(self, key: str) -> float:
        """Return the share of the learning rate that full weights get."""
        return self.settings.rate
