"""What a model with its adapter would be, counted without loading a single weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig

from treelora_cli.errors import DataError, TreeloraError
from treelora_cli.models.adapted import explain_targets, lora_config
from treelora_cli.models.backbone import (
    check_folder,
    choose_device,
    choose_dtype,
    load_tokenizer,
    loading_hint,
    one_line,
    source_of,
)
from treelora_cli.models.kind import auto_class, check_kind, check_reading
from treelora_cli.recipe import LoraSection, ModelSection


@dataclass(frozen=True)
class Outline:
    """Sizes of a backbone and its adapter.

    Attributes:
        parameters: entries of the frozen base.
        trainable: entries of the adapter.
        modules: adapted linear modules.
        base_bytes: memory of the base in its dtype.
        dtype: the base's dtype.
        device: where it would live.
        positions: the longest sequence, or None.
        encodes: whether it is an encoder-decoder.
        tokenizer: the model's tokenizer.
    """

    parameters: int
    trainable: int
    modules: int
    base_bytes: int
    dtype: str
    device: str
    positions: int | None
    encodes: bool
    tokenizer: Any

    @property
    def training_bytes(self) -> int:
        """The base, and for every adapter entry weight, gradient and two Adam moments (float32)."""
        return self.base_bytes + 16 * self.trainable

    @property
    def adapter_bytes(self) -> int:
        """One stored adapter, float32."""
        return 4 * self.trainable


def outline(section: ModelSection, lora: LoraSection) -> Outline:
    """Count a model from its config alone, on the meta device.

    Raises:
        DataError: no such model, or one that does not answer in text.
        UsageError: no module matches ``lora.targets``.
        EnvironmentProblem: the device is missing.
    """
    source = source_of(section)
    check_folder(source)
    device = choose_device(section.device)
    dtype = choose_dtype(section.dtype, device)
    options = {"revision": section.revision} if section.revision else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_kind(source, config)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype)
        tokenizer = load_tokenizer(source, options)
        check_reading(source, config, tokenizer)
    except TreeloraError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise DataError(
            f"model {source!r} cannot be outlined: {one_line(error)}", loading_hint(error)
        ) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"), explain_targets():
        adapted = get_peft_model(model, lora_config(lora))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    positions = getattr(config, "max_position_embeddings", None)
    return Outline(
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in trainable),
        modules=len(trainable) // 2,
        base_bytes=parameters * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        positions=int(positions) if positions else None,
        encodes=bool(config.is_encoder_decoder),
        tokenizer=tokenizer,
    )
