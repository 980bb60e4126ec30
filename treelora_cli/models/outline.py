"""What a model with its adapter would be, counted without loading a single weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig

from treelora_cli.errors import DataError, TreeloraError
from treelora_cli.models.adapted import (
    SLOT,
    saved_parameters,
)
from treelora_cli.models.backbone import (
    check_folder,
    choose_attention,
    choose_device,
    choose_dtype,
    load_tokenizer,
    loading_hint,
    one_line,
    source_of,
)
from treelora_cli.models.footprint import LayerSizes, expert_widths, layer_sizes, linear_widths
from treelora_cli.models.kind import auto_class, check_kind, check_reading
from treelora_cli.models.opened import base_parameters, check_opened
from treelora_cli.models.quantized import BYTES, Quantization, check_quantization
from treelora_cli.models.snapshot import WEIGHTS, is_more
from treelora_cli.models.targets import explain_targets, lora_config
from treelora_cli.recipe import LoraSection, ModelSection


@dataclass(frozen=True)
class Outline:
    """Sizes of a backbone and its adapter.

    Attributes:
        parameters: entries of the base.
        adapter: entries of the adapter.
        trainable: entries that are trained, of the adapter and of the base.
        opened: entries of the base among them.
        modules: adapted linear modules.
        base_bytes: memory of the base in its dtype, or as far as it is quantised in fewer bits.
        dtype: the base's dtype.
        itemsize: bytes of an entry in it.
        layers: widths of its layers.
        linear: entries of the matrices that quantisation would take.
        device: where it would live.
        positions: the longest sequence, or None.
        encodes: whether it is an encoder-decoder.
        tokenizer: the model's tokenizer.
    """

    parameters: int
    adapter: int
    trainable: int
    opened: int
    modules: int
    base_bytes: int
    dtype: str
    itemsize: int
    layers: LayerSizes
    linear: int
    device: str
    positions: int | None
    encodes: bool
    tokenizer: Any

    @property
    def training_bytes(self) -> int:
        """Base and adapter, and for what is trained gradient and two Adam moments (float32)."""
        return self.base_bytes + 4 * self.adapter + 12 * self.trainable

    def base_bytes_in(self, kind: Quantization) -> int:
        """Return what the base would take if it were quantised so."""
        return _base_bytes(self.parameters, self.linear, self.itemsize, kind)

    @property
    def stored_bytes(self) -> int:
        """What a task leaves, float32: its adapter, and the base's weights that were trained."""
        return 4 * (self.adapter + self.opened)

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint holds: what a task leaves, and two Adam moments of what is trained."""
        return self.stored_bytes + 8 * self.trainable


def _learns_lora(key: str) -> bool:
    return not is_more(key)


def outline(
    section: ModelSection, lora: LoraSection, learns: Callable[[str], bool] = _learns_lora
) -> Outline:
    """Count a model from its config alone, on the meta device.

    Args:
        section: the recipe's ``model`` section.
        lora: the recipe's ``lora`` section.
        learns: given a key of a snapshot, says whether that LoRA matrix or base weight is trained.

    Raises:
        DataError: no such model, or one that does not answer in text.
        UsageError: no module matches ``lora.targets``, or a weight cannot be trained.
        EnvironmentProblem: the device is missing.
    """
    source = source_of(section)
    check_folder(source)
    device = choose_device(section.device)
    dtype = choose_dtype(section.dtype, device)
    check_quantization(section.quantization, device)
    options = {"revision": section.revision} if section.revision else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_kind(source, config)
        model = _on_meta(config, dtype, section, device)
        tokenizer = load_tokenizer(source, options)
        check_reading(source, config, tokenizer)
    except TreeloraError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise DataError(
            f"model {source!r} cannot be outlined: {one_line(error)}", loading_hint(error)
        ) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    built, widths, stacked = model.config, linear_widths(model), expert_widths(model)
    linear = sum(read * given for read, given in widths.values())
    with torch.device("meta"), explain_targets():
        adapted = get_peft_model(model, lora_config(lora, model), adapter_name=SLOT)
    adapter = saved_parameters(adapted, SLOT)
    base = {WEIGHTS + name: p for name, p in base_parameters(adapted).items()}
    opened = [key for key in base if learns(key)]
    packed = set(widths) if section.quantization != "none" else set()
    for key in opened:
        name = key.removeprefix(WEIGHTS)
        held = torch.uint8 if name.removesuffix(".weight") in packed else base[key].dtype
        check_opened(name, held)
    positions = getattr(config, "max_position_embeddings", None)
    return Outline(
        parameters=parameters,
        adapter=sum(parameter.numel() for parameter in adapter.values()),
        trainable=sum(p.numel() for key, p in (adapter | base).items() if learns(key)),
        opened=sum(base[key].numel() for key in opened),
        modules=len(adapter) // 2,
        base_bytes=_base_bytes(parameters, linear, dtype.itemsize, section.quantization),
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        layers=layer_sizes(built, widths, stacked, adapter),
        linear=linear,
        device=str(device),
        positions=int(positions) if positions else None,
        encodes=bool(config.is_encoder_decoder),
        tokenizer=tokenizer,
    )


def _on_meta(config: Any, dtype: torch.dtype, section: ModelSection, device: torch.device) -> Any:
    """Build a model without weights, with the attention that loading it would choose."""
    attention = choose_attention(section.attention, device, dtype)
    build = partial(auto_class(config).from_config, config, dtype=dtype)
    with torch.device("meta"):
        try:
            return build(attn_implementation=attention)
        except (ImportError, ValueError):
            # As in loading: our own choice may not suit the architecture; the user's must.
            if attention is None or section.attention != "auto":
                raise
            # None is said, for the config keeps what it was told before.
            return build(attn_implementation=None)


def _base_bytes(parameters: int, linear: int, itemsize: int, kind: Quantization) -> int:
    """Return the memory of a base whose layers' matrices are quantised, if at all."""
    taken = 0 if kind == "none" else linear
    return (parameters - taken) * itemsize + int(taken * BYTES.get(kind, 0))
