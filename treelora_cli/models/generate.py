"""Answer prompts greedily: batches of similar length, the shared beginning read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from treelora_cli.models.adapted import BASE_ROW, AdaptedModel
from treelora_cli.models.encode import Encoder, pad_prompts
from treelora_cli.models.forward import forward_parameters
from treelora_cli.models.grouping import group_by_length
from treelora_cli.models.kind import decoder_start
from treelora_cli.models.soft import answering, most_rows, soft_width
from treelora_cli.models.spread import ALL, Spread

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

    Raises:
        ValueError: the base alone is to answer while the model has a condition; see
            :meth:`AdaptedModel.as_base`.
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
    spread: Spread = ALL,
) -> Iterator[dict[int, str]]:
    """Yield the answers of :func:`generate` batch by batch, by the prompts' numbers.

    Each process yields those of its part of the batches (``spread``), all equally often: where
    another has one batch more, the last one is empty.
    """
    encoded = [encoder.prompt(prompt)[0] for prompt in prompts]
    lengths = [len(ids) + soft_width(adapted) + max_new_tokens for ids in encoded]
    names = peft_names(adapted, adapters)
    config = generation_config(adapted, max_new_tokens, encoder.stops)
    shared = SharedPrefix(adapted, encoded, names)
    if adapted.device.type == "cpu":
        batch_tokens = min(batch_tokens or CPU_TOKENS, CPU_TOKENS)
    with adapted.evaluating():
        groups = group_by_length(lengths, most_rows(adapted, batch_size), batch_tokens)
        for chosen in spread.dealt(groups):
            on_batch()
            if not chosen:
                yield {}
                continue
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
    encodes = adapted.backbone.encodes
    rest = [prompt[start:] for prompt in prompts]
    ids, mask = pad_prompts(rest, config.pad_token_id, left=not encodes)
    more: dict[str, Any] = {} if names is None else {"adapter_names": list(names)}
    with torch.inference_mode():
        if start:
            before = torch.tensor(shared.tokens).expand(len(prompts), -1)
            ids = torch.cat([before, ids], dim=1)
            mask = torch.cat([torch.ones_like(before), mask], dim=1)
            more["past_key_values"] = shared.cache(names, len(prompts))
        elif encodes:
            # The cache that transformers makes has as many layers as the encoder, not the decoder.
            more["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids, mask = ids.to(adapted.device), mask.to(adapted.device)
        with answering(adapted, ids, mask) as inputs:
            output = adapted.peft.generate(generation_config=config, **inputs, **more)
    # A decoder begins with its start token; a causal model repeats the tokens it was given.
    given = 1 if encodes else ids.shape[1] if "input_ids" in inputs else 0
    new: Tensor = output[:, given:]
    return new


def peft_names(adapted: AdaptedModel, adapters: Adapters | None) -> list[str] | None:
    """Return PEFT's name of who answers each prompt; None: the live adapter answers all.

    Raises:
        ValueError: the base alone is to answer while the model has a condition.
    """
    if adapters is None:
        return None
    if adapted.condition is not None and None in adapters:
        raise ValueError("what the base alone says knows no condition; ask inside as_base()")
    return [name or BASE_ROW for name in adapters]


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
        decoder_start_token_id=decoder_start(adapted.backbone.model.config),
        use_cache=True,
    )


class SharedPrefix:
    """The tokens that all prompts begin with, such as a task's instruction, read once an adapter.

    Keys and values of a token depend on the tokens before it alone, so they are those that each
    prompt would compute. Only for causal models whose cache keeps every token of every layer, and
    not where a condition makes every prompt begin with something of its own.

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
        who = 1 if names is None else len(set(names))
        fits = adapted.condition is None and has_plain_cache(adapted.backbone.model)
        if fits and len(prompts) > 2 * who:
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
    if model.config.is_encoder_decoder or "past_key_values" not in forward_parameters(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
