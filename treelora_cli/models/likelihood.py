"""Classification by likelihood: the label that the model finds likeliest behind the prompt.

All labels of a prompt are read in one sequence, ``[prompt][label 1][label 2]...``. Each label sees
the prompt and itself alone, and its positions go on from the prompt's end, so it scores as if it
stood there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import BASE_ROW, AdaptedModel
from treelora_cli.models.encode import Encoder, pad_prompts, positions_of
from treelora_cli.models.forward import forward_parameters
from treelora_cli.models.generate import Adapters
from treelora_cli.models.grouping import group_by_length

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

    Raises:
        UsageError: ``data.max_answer_tokens`` cuts labels until two are the same.
    """
    for scores in score_batches(
        adapted, encoder, prompts, labels, separator, batch_size, on_batch,
        batch_tokens=batch_tokens, adapters=adapters,
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
) -> Iterator[dict[int, Tensor]]:
    """Yield each prompt's summed log-probabilities of the labels, float32 [labels], in nats.

    Arguments and errors are those of :func:`choose_batches`.
    """
    if not prompts:
        return
    encoded = [encoder.prompt(prompt)[0] for prompt in prompts]
    learned = [_learned(encoder, prompts[0], label, separator) for label in labels]
    _check_distinct(labels, learned)
    width = sum(len(ids) - 1 for ids in learned)
    lengths = [len(ids) + width for ids in encoded]
    together = takes_label_masks(adapted.backbone.model, max(lengths))
    blocks = [LabelBlock.of(learned)] if together else [LabelBlock.of([ids]) for ids in learned]
    vocabulary = int(adapted.backbone.model.config.get_text_config().vocab_size)
    read = max(len(block.tokens) + 1 for block in blocks)
    rows = max(1, min(batch_size, MOST_LOGITS // (read * vocabulary)))
    if adapted.device.type == "cpu":
        batch_tokens = min(batch_tokens or CPU_TOKENS, CPU_TOKENS)
    with adapted.evaluating():
        for chosen in group_by_length(lengths, rows, batch_tokens):
            on_batch()
            names = None if adapters is None else [adapters[index] or BASE_ROW for index in chosen]
            ids = [encoded[index] for index in chosen]
            with torch.inference_mode():
                scores = [
                    _label_scores(adapted, ids, block, encoder.pad, names) for block in blocks
                ]
            yield dict(zip(chosen, torch.cat(scores, dim=1).cpu(), strict=True))


def _learned(encoder: Encoder, prompt: str, label: str, separator: str) -> list[int]:
    example = encoder.example(prompt, label, separator)
    return list(example.tokens[example.answer_start :])


def _check_distinct(labels: Sequence[str], learned: Sequence[Sequence[int]]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, learned, strict=True):
        other = first.setdefault(tuple(ids), label)
        if other != label:
            raise UsageError(
                f"data.max_answer_tokens cuts the labels {other!r} and {label!r} to equal tokens",
                "score with --scoring greedy, or train with longer answers",
            )


def takes_label_masks(model: Any, longest: int) -> bool:
    """Tell whether a model reads several labels in one sequence: a mask of our own, our positions.

    Those are models with rotary positions and without recurrence, whose window, if any, is longer
    than the sequences, under an attention that adds a [B, 1, S, S] mask.

    Args:
        model: a causal language model.
        longest: tokens of the longest sequence.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        {"attention_mask", "position_ids"} <= forward_parameters(model)
        and getattr(config, "rope_parameters", None) is not None
        and not getattr(config, "alibi", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
        and config._attn_implementation in {"sdpa", "eager"}
    )


def _label_scores(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    block: LabelBlock,
    pad: int,
    names: Sequence[str] | None,
) -> Tensor:
    """Return the log-probability of each label behind each prompt, float32 [B, labels]."""
    model, keep = adapted.backbone.model, len(block.tokens) + 1
    ids, mask = pad_prompts(prompts, pad)
    ends = positions_of(mask)[:, -1:]
    tail = block.tokens.expand(len(prompts), -1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([ids, tail], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(tail)], dim=1),
        "position_ids": torch.cat([positions_of(mask), ends + block.offsets], dim=1),
    }
    if block.count > 1:
        inputs["attention_mask"] = label_mask(mask, block.owner, model.dtype)
    inputs = {key: value.to(adapted.device) for key, value in inputs.items()}
    accepted = forward_parameters(model)
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    if names is not None:
        inputs["adapter_names"] = list(names)
    logits = adapted.peft(**inputs, use_cache=False).logits[:, -keep:].float()
    at, target, label = (part.to(logits.device) for part in (block.at, block.target, block.label))
    found = logits[:, at, target] - logits.logsumexp(dim=-1)[:, at]
    scores: Tensor = found.new_zeros(len(prompts), block.count)
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
    owners = torch.cat([torch.full((prompts.shape[1],), -1), owner])
    real = torch.cat([prompts.bool(), torch.ones(len(prompts), len(owner), dtype=torch.bool)], 1)
    sees = torch.ones(size, size, dtype=torch.bool).tril()
    sees &= (owners == -1) | (owners == owners.unsqueeze(1))
    seen = sees & real.unsqueeze(1)
    # Padding must see something, or its rows of the softmax are not numbers.
    seen |= torch.eye(size, dtype=torch.bool)
    low = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, low).unsqueeze(1)
