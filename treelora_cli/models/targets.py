"""Which modules of a model get an adapter, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_CHOICE

from treelora_cli.errors import UsageError
from treelora_cli.recipe import LoraSection

QUERY_AND_VALUE = (("q_proj", "v_proj"), ("q", "v"), ("qkv_proj",))
"""What query and value are called, most often first; the last holds both in one matrix."""


def lora_config(lora: LoraSection, model: Any) -> LoraConfig:
    """Return PEFT's configuration of the adapter a recipe asks for.

    Args:
        lora: the recipe's ``lora`` section.
        model: the transformers model, on any device, that it is for.
    """
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=named_targets(lora) or _usual_targets(model),
        bias="none",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )


def named_targets(lora: LoraSection) -> str | list[str] | None:
    """Return the targets that a recipe names, as PEFT takes them; None for ``auto``."""
    if lora.targets == "auto":
        return None
    return lora.targets if isinstance(lora.targets, str) else list(lora.targets)


def _usual_targets(model: Any) -> list[str] | None:
    """Return PEFT's choice for the architecture, else query and value where they are so named.

    PEFT 0.21 knows Mixtral but loses its choice on the way, and knows no other mixture of experts,
    nor Phi-3 and UMT5.
    None where there is no such module either: PEFT then says so.
    """
    known = PEFTS_CHOICE.get(model.config.model_type)
    if known is not None:
        return list(known)
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((list(names) for names in QUERY_AND_VALUE if last.issuperset(names)), None)


@contextmanager
def explain_targets() -> Iterator[None]:
    """Turn PEFT's complaint about target modules into one a user can act on.

    Raises:
        UsageError: no module of the model matches the targets.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"lora.targets: {str(error).splitlines()[0]}",
            "list module names of the model, such as lora.targets=[q_proj,v_proj], or use "
            "lora.targets=all-linear; a mixture of experts takes that with lora.dropout=0 only",
        ) from None
