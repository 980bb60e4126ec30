"""The two things a model does here: give the loss of a batch, and answer prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch, Encoder, pad_prompts

DECODING = "greedy"


def answer_loss(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the answer tokens (scalar, float32).

    The output layer is computed for the last K + 1 positions only (K the longest answer): position
    p predicts token p + 1, and every answer ends in the last column.
    """
    keep = batch.labels.shape[1] + 1
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    accepted = _forward_parameters(adapted)
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    logits = adapted.peft(**inputs).logits[:, -keep:-1]
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _forward_parameters(adapted: AdaptedModel) -> frozenset[str]:
    return frozenset(inspect.signature(adapted.backbone.model.forward).parameters)


def generation_config(
    adapted: AdaptedModel, max_new_tokens: int, stops: Sequence[int]
) -> GenerationConfig:
    """Greedy decoding; the model's own generation settings were dropped when it was loaded.

    Args:
        adapted: the model.
        max_new_tokens: the longest answer.
        stops: tokens that end an answer.
    """
    tokenizer = adapted.backbone.tokenizer
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def _length_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))


def generate(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answer prompts greedily, in batches of similar length.

    Args:
        adapted: the model; its live adapter answers.
        encoder: cuts and tokenises prompts.
        prompts: the texts.
        max_new_tokens: the longest answer.
        batch_size: prompts a batch.
        on_batch: called before every batch; may raise to stop.

    Returns:
        One answer per prompt, in the order of the prompts, special tokens left out.
    """
    encoded = [encoder.prompt(prompt)[0] for prompt in prompts]
    answers: dict[int, str] = {}
    config = generation_config(adapted, max_new_tokens, encoder.stops)
    was_training = adapted.peft.training
    adapted.peft.eval()
    try:
        for chosen in _chunks(_length_order(encoded), batch_size):
            on_batch()
            ids, mask = pad_prompts([encoded[index] for index in chosen], encoder.pad)
            with torch.inference_mode():
                output = adapted.peft.generate(
                    input_ids=ids.to(adapted.device),
                    attention_mask=mask.to(adapted.device),
                    generation_config=config,
                )
            texts = adapted.backbone.tokenizer.batch_decode(
                output[:, ids.shape[1] :], skip_special_tokens=True
            )
            answers.update(zip(chosen, texts, strict=True))
    finally:
        adapted.peft.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
