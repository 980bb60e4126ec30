"""Answer prompts greedily: batches of similar length, the shared beginning read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from treelora_cli.models.adapted import BASE_ROW, AdaptedModel
from treelora_cli.models.encode import Encoder, pad_prompts
from treelora_cli.models.forward import forward_parameters
from treelora_cli.models.grouping import group_by_length

DECODING = "greedy"
CPU_TOKENS = 2048
"""Most tokens of a batch on a CPU: more no longer fit its cache, and are read more slowly."""
LEAST_SHARED = 16
"""A shared beginning of fewer tokens is not worth a forward pass of its own."""

Adapters = Sequence[str | None]
"""Who answers, a slot of :meth:`AdaptedModel.beside` per prompt; None: the base alone."""
LayerStates = tuple[Tensor, Tensor]
"""Keys and values of a layer, each [1, heads, tokens, width]."""


def generate(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    batch_tokens: int | None = None,
    adapters: Adapters | None = None,
) -> list[str]:
    """Answer prompts greedily, in batches of similar length.

    Args:
        adapted: the model.
        encoder: cuts and tokenises prompts.
        prompts: the texts.
        max_new_tokens: the longest answer.
        batch_size: most prompts a batch.
        on_batch: called before every batch; may raise to stop.
        batch_tokens: most tokens a batch, padding and the longest answer counted; None: no limit.
        adapters: who answers each prompt; None: the live adapter answers all.

    Returns:
        One answer per prompt, in the order of the prompts, special tokens left out.
    """
    answers: dict[int, str] = {}
    for batch in generate_batches(
        adapted, encoder, prompts, max_new_tokens, batch_size, on_batch,
        batch_tokens=batch_tokens, adapters=adapters,
    ):  # fmt: skip
        answers.update(batch)
    return [answers[index] for index in range(len(prompts))]


def generate_batches(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    batch_tokens: int | None = None,
    adapters: Adapters | None = None,
) -> Iterator[dict[int, str]]:
    """Yield the answers of :func:`generate` batch by batch, by the prompts' numbers."""
    encoded = [encoder.prompt(prompt)[0] for prompt in prompts]
    lengths = [len(ids) + max_new_tokens for ids in encoded]
    names = None if adapters is None else [name or BASE_ROW for name in adapters]
    config = generation_config(adapted, max_new_tokens, encoder.stops)
    shared = SharedPrefix(adapted, encoded, names)
    if adapted.device.type == "cpu":
        batch_tokens = min(batch_tokens or CPU_TOKENS, CPU_TOKENS)
    with adapted.evaluating():
        for chosen in group_by_length(lengths, batch_size, batch_tokens):
            on_batch()
            rows = None if names is None else [names[index] for index in chosen]
            tokens = _generate_batch(
                adapted, [encoded[index] for index in chosen], rows, config, shared
            )
            texts = adapted.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            yield dict(zip(chosen, texts, strict=True))


def _generate_batch(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str] | None,
    config: GenerationConfig,
    shared: SharedPrefix,
) -> Tensor:
    """Return the new tokens, int64 [B, at most max_new_tokens]."""
    start = len(shared.tokens)
    ids, mask = pad_prompts([prompt[start:] for prompt in prompts], config.pad_token_id)
    inputs: dict[str, Any] = {} if names is None else {"adapter_names": list(names)}
    with torch.inference_mode():
        if start:
            before = torch.tensor(shared.tokens).expand(len(prompts), -1)
            ids = torch.cat([before, ids], dim=1)
            mask = torch.cat([torch.ones_like(before), mask], dim=1)
            inputs["past_key_values"] = shared.cache(names, len(prompts))
        output = adapted.peft.generate(
            input_ids=ids.to(adapted.device),
            attention_mask=mask.to(adapted.device),
            generation_config=config,
            **inputs,
        )
    new: Tensor = output[:, ids.shape[1] :]
    return new


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


class SharedPrefix:
    """The tokens that all prompts begin with, such as a task's instruction, read once an adapter.

    Keys and values of a token depend on the tokens before it alone, so they are those that each
    prompt would compute. Only for models whose cache keeps every token of every layer.

    Args:
        adapted: the model.
        prompts: the tokenised prompts.
        names: PEFT's name of each prompt's adapter; None: the live one.

    Attributes:
        tokens: the shared beginning; empty where there is none worth it. At least one token of
            every prompt comes after it.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        prompts: Sequence[list[int]],
        names: Sequence[str] | None = None,
    ) -> None:
        self._adapted = adapted
        self._states: dict[str | None, list[LayerStates]] = {}
        self.tokens: list[int] = []
        answering = 1 if names is None else len(set(names))
        if len(prompts) > 2 * answering and has_plain_cache(adapted.backbone.model):
            length = min(common_length(prompts), min(map(len, prompts)) - 1)
            self.tokens = list(prompts[0][:length]) if length >= LEAST_SHARED else []

    def cache(self, names: Sequence[str] | None, rows: int) -> DynamicCache:
        """Return a fresh cache that holds the shared tokens for a batch of rows."""
        keys: Sequence[str | None] = names if names is not None else [None] * rows
        found = [self._read(key) for key in keys]
        return DynamicCache(
            [
                (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
                for layer in zip(*found, strict=True)
            ]
        )

    def _read(self, name: str | None) -> list[LayerStates]:
        if name not in self._states:
            model = self._adapted.backbone.model
            inputs: dict[str, Any] = {} if name is None else {"adapter_names": [name]}
            if "logits_to_keep" in forward_parameters(model):
                inputs["logits_to_keep"] = 1
            ids = torch.tensor([self.tokens], device=self._adapted.device)
            past = self._adapted.peft(input_ids=ids, use_cache=True, **inputs).past_key_values
            self._states[name] = [(layer[0], layer[1]) for layer in past]
        return self._states[name]


def common_length(sequences: Sequence[list[int]]) -> int:
    """Return how many tokens all sequences begin with: as many as the first and last in order."""
    first, last = min(sequences), max(sequences)
    pairs = zip(first, last, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def has_plain_cache(model: Any) -> bool:
    """Tell whether a model's cache keeps every token of every layer: no window, no recurrence."""
    if "past_key_values" not in forward_parameters(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
