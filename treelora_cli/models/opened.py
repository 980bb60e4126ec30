"""Weights of the base that are trained: their names, and which can be trained at all."""

from __future__ import annotations

from typing import Any

import torch

from treelora_cli.errors import UsageError


def base_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters under PEFT's adapters by their name in the base model.

    None stands there twice where weights are tied.
    """
    return {
        path.replace(".base_layer.", "."): parameter
        for path, parameter in peft_model.get_base_model().named_parameters()
        if "lora_" not in path
    }


def check_opened(name: str, dtype: torch.dtype) -> None:
    """See to it that a base weight can be trained.

    At a weight of 0.02 a step of 1e-5 is a twelfth of the spacing of bfloat16: it would be lost.

    Args:
        name: the weight's.
        dtype: its type.

    Raises:
        UsageError: it is quantised or in half precision.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UsageError(
            f"the base's weight {name} is quantised and cannot be trained",
            "use a method that trains LoRA only, or a base in floating point",
        )
    if dtype.itemsize < 4:
        raise UsageError(
            f"the base's weight {name} is in {str(dtype).removeprefix('torch.')}, in whose "
            "rounding small steps are lost",
            "use --set model.dtype=float32, or a method that trains LoRA only",
        )
