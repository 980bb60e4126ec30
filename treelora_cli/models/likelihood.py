"""Classification by likelihood: the label that the model finds likeliest behind the prompt.

All labels of a prompt are read in one sequence, ``[prompt][label 1][label 2]...``. Each label sees
the prompt and itself alone, and its positions go on from the prompt's end, so it scores as if it
stood there alone. Where that cannot be, a label at a time is read.

Of an encoder-decoder the prompt is encoded once, and the decoder reads a label at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder, pad_prompts, positions_of
from treelora_cli.models.forward import forward_parameters, shifted_right
from treelora_cli.models.generate import Adapters, peft_names
from treelora_cli.models.grouping import group_by_length
from treelora_cli.models.readback import send
from treelora_cli.models.soft import Inputs, answering, embed, most_rows, soft_width
from treelora_cli.models.spread import ALL, Spread

CPU_TOKENS = 2048
"""Most tokens of a batch on a CPU: one forward pass, whose activations should fit its cache."""
MOST_LOGITS = 1 << 28
"""Logits of a forward pass, in entries; a GiB in float32."""


@dataclass(frozen=True)
class LabelBlock:
    """Labels behind one another, as they are read behind every prompt.

    A label of T tokens (its end token counted) is predicted from T positions: the prompt's last
    one, and its own but the end token, which therefore is not read. W tokens are read in all.

    Attributes:
        tokens: int64 [W], what is read.
        offsets: int64 [W], each token's distance from the prompt's end, from 1.
        owner: int64 [W], the label of each token.
        at: int64 [T1 + T2 + ...], the column that predicts: 0 the prompt's last token, else 1 + the
            place in ``tokens``.
        target: as ``at``, the token predicted.
        label: as ``at``, the label it belongs to.
        count: labels.
    """

    tokens: Tensor
    offsets: Tensor
    owner: Tensor
    at: Tensor
    target: Tensor
    label: Tensor
    count: int

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelBlock:
        """Arrange labels, each the tokens learned for it, end token included."""
        tokens: list[int] = []
        offsets: list[int] = []
        owner: list[int] = []
        at: list[int] = []
        target: list[int] = []
        label: list[int] = []
        for number, ids in enumerate(labels):
            at += [0, *range(len(tokens) + 1, len(tokens) + len(ids))]
            tokens += ids[:-1]
            offsets += range(1, len(ids))
            owner += [number] * (len(ids) - 1)
            target += ids
            label += [number] * len(ids)
        return cls(
            tokens=_indices(tokens),
            offsets=_indices(offsets),
            owner=_indices(owner),
            at=_indices(at),
            target=_indices(target),
            label=_indices(label),
            count=len(labels),
        )

    def to(self, device: torch.device) -> LabelBlock:
        """Return the block with what is read on a device."""
        read = (send(part, device) for part in (self.tokens, self.offsets, self.owner))
        tokens, offsets, owner = read
        return replace(self, tokens=tokens, offsets=offsets, owner=owner)


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def choose_batches(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    labels: Sequence[str],
    separator: str,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    batch_tokens: int | None = None,
    adapters: Adapters | None = None,
    spread: Spread = ALL,
) -> Iterator[dict[int, str]]:
    """Yield the likeliest label of every prompt, batch by batch, by the prompts' numbers.

    Args:
        adapted: the model.
        encoder: cuts and tokenises as in training: separator, answer, end token.
        prompts: the texts.
        labels: the closed answer set; of equally likely ones the first is taken.
        separator: the text between prompt and answer.
        batch_size: most prompts a batch.
        on_batch: called before every batch; may raise to stop.
        batch_tokens: most tokens a batch, padding and labels counted; None: no limit.
        adapters: who answers each prompt; None: the live adapter answers all.
        spread: this process's part of the batches; where another has one more, its last is empty.

    Raises:
        UsageError: two labels are the same tokens, cut or not.
        ValueError: the base alone is to answer while the model has a condition.
    """
    for scores in score_batches(
        adapted, encoder, prompts, labels, separator, batch_size, on_batch,
        batch_tokens=batch_tokens, adapters=adapters, spread=spread,
    ):  # fmt: skip
        yield {index: labels[int(row.argmax())] for index, row in scores.items()}


def score_batches(
    adapted: AdaptedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    labels: Sequence[str],
    separator: str,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    batch_tokens: int | None = None,
    adapters: Adapters | None = None,
    spread: Spread = ALL,
) -> Iterator[dict[int, Tensor]]:
    """Yield each prompt's summed log-probabilities of the labels, float32 [labels], in nats.

    Arguments and errors are those of :func:`choose_batches`.
    """
    if not prompts:
        return
    encoded = [encoder.prompt(prompt)[0] for prompt in prompts]
    learned = [_learned(encoder, prompts[0], label, separator) for label in labels]
    _check_distinct(labels, learned, encoder.max_answer_tokens)
    names = peft_names(adapted, adapters)
    longest = max(map(len, encoded)) + soft_width(adapted) + sum(len(ids) - 1 for ids in learned)
    together = takes_label_masks(adapted.backbone.model, longest)
    blocks = [LabelBlock.of(learned)] if together else [LabelBlock.of([ids]) for ids in learned]
    read = max(len(block.tokens) + 1 for block in blocks)
    lengths = [len(ids) + soft_width(adapted) + read - 1 for ids in encoded]
    vocabulary = int(adapted.backbone.model.config.get_text_config().vocab_size)
    rows = max(1, min(most_rows(adapted, batch_size), MOST_LOGITS // (read * vocabulary)))
    if adapted.device.type == "cpu":
        batch_tokens = min(batch_tokens or CPU_TOKENS, CPU_TOKENS)
    with adapted.evaluating():
        groups = group_by_length(lengths, rows, batch_tokens)
        for chosen in spread.dealt(groups):
            on_batch()
            if not chosen:
                yield {}
                continue
            who = None if names is None else [names[index] for index in chosen]
            ids = [encoded[index] for index in chosen]
            with torch.inference_mode():
                scores = _scores(adapted, ids, blocks, encoder.pad, who)
            yield dict(zip(chosen, scores.cpu(), strict=True))


def _learned(encoder: Encoder, prompt: str, label: str, separator: str) -> list[int]:
    example = encoder.example(prompt, label, separator)
    return list(example.tokens[example.answer_start :])


def _check_distinct(labels: Sequence[str], learned: Sequence[Sequence[int]], longest: int) -> None:
    first: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, learned, strict=True):
        other = first.setdefault(tuple(ids), label)
        if other != label and len(ids) == longest + 1:
            raise UsageError(
                f"data.max_answer_tokens cuts the labels {other!r} and {label!r} to equal tokens",
                "score with --scoring greedy, or train with longer answers",
            )
        if other != label:
            raise UsageError(
                f"the labels {other!r} and {label!r} are the same tokens to this model's tokenizer",
                "it may not know their script: take a base that does",
            )


def takes_label_masks(model: Any, longest: int) -> bool:
    """Tell whether a model reads several labels in one sequence: a mask of our own, our positions.

    Those are models with rotary positions and without recurrence, whose window, if any, is longer
    than the sequences, under an attention that adds a [B, 1, S, S] mask.

    Args:
        model: a language model; an encoder-decoder's labels would stand behind no prompt.
        longest: tokens of the longest sequence.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        not model.config.is_encoder_decoder
        and {"attention_mask", "position_ids"} <= forward_parameters(model)
        and getattr(config, "rope_parameters", None) is not None
        and not getattr(config, "alibi", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
        and config._attn_implementation in {"sdpa", "eager"}
    )


def _scores(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    blocks: Sequence[LabelBlock],
    pad: int,
    names: Sequence[str] | None,
) -> Tensor:
    """Return the log-probability of each label behind each prompt, float32 [B, labels]."""
    encodes = adapted.backbone.encodes
    padded = pad_prompts(prompts, pad, left=not encodes)
    ids, mask = (tensor.to(adapted.device) for tensor in padded)
    more: dict[str, Any] = {} if names is None else {"adapter_names": list(names)}
    after = _decoded if encodes else _behind
    with answering(adapted, ids, mask) as read:
        logits = after(adapted, read, blocks, more)
        scores = [_label_scores(found, block) for found, block in zip(logits, blocks, strict=True)]
    return torch.cat(scores, dim=1)


def _behind(
    adapted: AdaptedModel, read: Inputs, blocks: Sequence[LabelBlock], more: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield a causal model's logits [B, 1 + W, vocabulary] for every block behind the prompts."""
    model, mask = adapted.backbone.model, read["attention_mask"]
    accepted, places = forward_parameters(model), positions_of(mask)
    for block in (block.to(adapted.device) for block in blocks):
        keep = len(block.tokens) + 1
        tail = block.tokens.expand(len(mask), -1)
        inputs: dict[str, Any] = more | {
            "attention_mask": torch.cat([mask, tail.new_ones(tail.shape)], dim=1)
        }
        if "input_ids" in read:
            inputs["input_ids"] = torch.cat([read["input_ids"], tail], dim=1)
        else:
            embedded = [read["inputs_embeds"], embed(model, tail)]
            inputs["inputs_embeds"] = torch.cat(embedded, dim=1)
        if block.count > 1:
            inputs["attention_mask"] = label_mask(mask, block.owner, model.dtype)
        if "position_ids" in accepted:
            inputs["position_ids"] = torch.cat([places, places[:, -1:] + block.offsets], dim=1)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = keep
        yield adapted.peft(**inputs, use_cache=False).logits[:, -keep:]


def _decoded(
    adapted: AdaptedModel, read: Inputs, blocks: Sequence[LabelBlock], more: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield a decoder's logits [B, T, vocabulary] for every label, a block of its own each.

    The prompts are encoded with the first label. What the decoder's layers make of them, keys and
    values, is the same for all labels and kept; what they make of a label is not.
    """
    across, inputs = DynamicCache(), read
    for block in blocks:
        labels = block.target.to(adapted.device).expand(len(read["attention_mask"]), -1)
        found = adapted.peft(
            **inputs,
            **more,
            decoder_input_ids=shifted_right(adapted.backbone.model, labels),
            past_key_values=EncoderDecoderCache(DynamicCache(), across),
        )
        encoded = BaseModelOutput(last_hidden_state=found.encoder_last_hidden_state)
        inputs = {"encoder_outputs": encoded, "attention_mask": read["attention_mask"]}
        yield found.logits


def _label_scores(logits: Tensor, block: LabelBlock) -> Tensor:
    """Return the log-probability of each label, float32 [B, labels].

    Args:
        logits: [B, 1 + W, vocabulary] at the end of the prompt and at the block's tokens.
        block: the labels.
    """
    at, target, label = (part.to(logits.device) for part in (block.at, block.target, block.label))
    values = logits.float()
    found = values[:, at, target] - values.logsumexp(dim=-1)[:, at]
    scores: Tensor = found.new_zeros(len(values), block.count)
    return scores.index_add_(1, label, found)


def label_mask(prompts: Tensor, owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention scores: 0 where a token sees another, else very low.

    Args:
        prompts: int64 [B, P], 1 for the real tokens of the prompts.
        owner: int64 [W], the label of each token behind them.
        dtype: the model's.

    Returns:
        [B, 1, P + W, P + W]; the prompts are causal, a label sees the prompt and itself so far.
    """
    size = prompts.shape[1] + len(owner)
    device = prompts.device
    owners = torch.cat([owner.new_full((prompts.shape[1],), -1), owner])
    real = torch.cat([prompts.bool(), prompts.new_ones(len(prompts), len(owner)).bool()], dim=1)
    sees = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    sees &= (owners == -1) | (owners == owners.unsqueeze(1))
    seen = sees & real.unsqueeze(1)
    # Padding must see something, or its rows of the softmax are not numbers.
    seen |= torch.eye(size, dtype=torch.bool, device=device)
    added = torch.zeros(seen.shape, dtype=dtype, device=device)
    return added.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
