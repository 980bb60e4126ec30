"""A base whose linear layers are held in 4 or 8 bits, by bitsandbytes through transformers.

Embeddings, norms and the output layer stay as they are, and so do experts: transformers stacks them
in parameters of their own, which bitsandbytes does not take.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from treelora_cli.errors import EnvironmentProblem

Quantization = Literal["none", "nf4", "int8"]

BYTES: dict[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes an entry of a quantised matrix takes: 4 bits, one byte of scale for 64 entries, and four
for 256 scales (double quantisation); or 8 bits. What int8 keeps of every row is left out."""


def check_quantization(kind: Quantization, device: torch.device) -> None:
    """See to it that a base can be quantised here.

    Args:
        kind: the recipe's ``model.quantization``.
        device: where the model is to live.

    Raises:
        EnvironmentProblem: bitsandbytes is missing, cannot be imported, or not for this device.
    """
    if kind == "none":
        return
    if find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(
            f"model.quantization={kind} needs the package bitsandbytes",
            "pip install 'treelora[quantization]', or model.quantization=none",
        )
    try:
        found = import_module("bitsandbytes")
    except Exception as error:  # it loads a library of its own for the CUDA that it finds
        raise EnvironmentProblem(
            f"model.quantization={kind}: bitsandbytes cannot be imported ({type(error).__name__})",
            "`python -m bitsandbytes` says what it lacks; or model.quantization=none",
        ) from None
    known = getattr(found, "supported_torch_devices", frozenset({"cuda"}))
    if device.type not in known:
        raise EnvironmentProblem(
            f"model.quantization={kind}: the installed bitsandbytes has nothing for {device.type}",
            "use a CUDA device, or model.quantization=none",
        )


def quantized_loading(
    kind: Quantization, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told to load a quantised base; nothing where it is not.

    Args:
        kind: the recipe's ``model.quantization``.
        device: the weights are put there while they are read, for they cannot be moved later.
        dtype: what is computed in.
    """
    if kind == "none":
        return {}
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    return {"quantization_config": config, "device_map": {"": device}}
