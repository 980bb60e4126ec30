"""Causal language model or encoder-decoder: what a config says, and which ones can be used."""

from __future__ import annotations

from typing import Any

from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from treelora_cli.errors import DataError

_OTHERS = "use a T5, mT5 or Flan-T5 model, or a causal language model"


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a model which answers text with text."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_kind(source: str, config: Any) -> None:
    """See to it that an encoder-decoder reads and writes text.

    Raises:
        DataError: it hears or sees, its answers depend on their neighbours in a batch, or it does
            not say what a decoder begins with.
    """
    if not config.is_encoder_decoder:
        return
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise DataError(
            f"model {source!r} is an encoder-decoder ({config.model_type}) that does not answer "
            "text with text",
            _OTHERS,
        )
    if hasattr(config, "expert_capacity"):
        raise DataError(
            f"model {source!r} ({config.model_type}) drops tokens that its experts have no room "
            "for, so that an answer would depend on what else is in the batch",
            _OTHERS,
        )
    if decoder_start(config) is None:
        raise DataError(
            f"model {source!r} does not say which token its decoder begins with",
            "set decoder_start_token_id in its config.json; in T5 it is the padding token",
        )


def check_reading(source: str, config: Any, tokenizer: Any) -> None:
    """See to it that an encoder-decoder reads a text and the end token, as T5 does.

    BART begins every text with a token of its own, translation models name the language there, on
    both sides; without it they would be read as they never were trained.

    Raises:
        DataError: the tokenizer puts tokens before a text.
    """
    if not config.is_encoder_decoder:
        return
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    if whole[: len(bare)] != bare:
        raise DataError(
            f"model {source!r} ({config.model_type}) begins every text with "
            f"{tokenizer.decode(whole[:1])!r}; only encoder-decoders that read text and end token, "
            "as T5 does, are supported",
            _OTHERS,
        )


def decoder_start(config: Any) -> int | None:
    """Return the token that an encoder-decoder's answers begin behind; None where there is none."""
    return getattr(config, "decoder_start_token_id", None)
