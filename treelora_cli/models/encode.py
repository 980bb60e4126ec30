"""Text to tokens: prompt and answer are tokenised apart, so labels mask exactly the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from treelora_cli.conversation import turns_of
from treelora_cli.errors import UsageError
from treelora_cli.models.chat import ChatTemplate
from treelora_cli.recipe import DataSection

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row: ``tokens[:answer_start]`` is read, the rest is learned.

    Attributes:
        tokens: begin token if the tokenizer has one, prompt, answer, end token.
        answer_start: index of the first answer token.
        truncated: True if prompt or answer was cut.
    """

    tokens: tuple[int, ...]
    answer_start: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded examples; answers end at the last column.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S].
        position_ids: int64 [B, S]; each row counts from 0 at its first real token.
        labels: int64 [B, K]: the last K tokens, ``IGNORED`` where they are not the answer's.
        tokens: real tokens in the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    tokens: int

    @property
    def answer_tokens(self) -> int:
        """Tokens the loss is taken over, end tokens included."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.tokens,
        )


class Encoder:
    """Tokenise rows for training and prompts for generation.

    Args:
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: longer prompts are cut.
        max_answer_tokens: longer answers are cut; the end token always stays.
        truncate: ``left`` drops a long prompt's beginning (as the papers' code does), ``middle``
            keeps both ends.
        positions: the model's longest sequence, or None.
        chat: render prompts with the tokenizer's chat template; otherwise they are read as they
            are, after the begin token.

    Attributes:
        end: the token learned after every answer.
        stops: the tokens at which generation ends.

    Raises:
        UsageError: prompt and answer together exceed the model's positions, or there is no chat
            template to use.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        truncate: Literal["left", "middle"] = "left",
        positions: int | None = None,
        *,
        chat: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer) if chat else None
        has_bos = self.chat is None and tokenizer.bos_token_id is not None
        self.bos = [tokenizer.bos_token_id] if has_bos else []
        self.eos = tokenizer.eos_token_id
        self.end = self.eos if self.chat is None else self.chat.end
        self.stops = sorted({self.end, self.eos})
        self.pad = tokenizer.pad_token_id
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.truncate = truncate
        needed = len(self.bos) + max_prompt_tokens + max_answer_tokens + 1
        if positions is not None and needed > positions:
            raise UsageError(
                f"data.max_prompt_tokens {max_prompt_tokens} + data.max_answer_tokens "
                f"{max_answer_tokens} + begin and end tokens = {needed}, but the model has "
                f"{positions} positions",
                f"e.g. {_lengths_that_fit(positions - len(self.bos) - 1, max_answer_tokens)}",
            )

    def _ids(self, text: str, *, literal: bool = False) -> list[int]:
        """Return a text's tokens; ``literal`` spells out what looks like a special token."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=literal)
        return list(ids["input_ids"])

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """Return a prompt's tokens as the model reads them, and whether it was cut.

        Args:
            text: the prompt; a ``Conversation`` brings its turns for the chat template.
        """
        if self.chat is not None:
            return self.chat.fit(turns_of(text), self.max_prompt_tokens, self.truncate)
        ids = self._ids(text)
        cut = len(ids) > self.max_prompt_tokens
        if cut and self.truncate == "left":
            ids = ids[-self.max_prompt_tokens :]
        elif cut:
            head = self.max_prompt_tokens // 2
            ids = ids[:head] + ids[len(ids) - (self.max_prompt_tokens - head) :]
        return self.bos + ids, cut

    def example(self, prompt: str, answer: str, separator: str = "") -> Example:
        """Tokenise a training row; the answer is kept and always ends with the end token.

        Args:
            prompt: the prompt.
            answer: what is learned.
            separator: the text between them; in a chat the template says what stands there.
        """
        read, prompt_cut = self.prompt(prompt)
        lead = separator if self.chat is None else self.chat.lead
        # An end token within an answer would teach the model to stop there.
        learned = self._ids(lead + answer, literal=True)
        answer_cut = len(learned) > self.max_answer_tokens
        learned = [*learned[: self.max_answer_tokens], self.end]
        return Example((*read, *learned), len(read), prompt_cut or answer_cut)


def _lengths_that_fit(room: int, answer: int) -> str:
    """Return the settings to try: a shorter prompt, or both where the answer takes most of it."""
    if room - answer >= room // 4:
        return f"--set data.max_prompt_tokens={room - answer}"
    answer = max(1, room // 4)
    prompt = max(1, room - answer)
    return f"--set data.max_prompt_tokens={prompt} --set data.max_answer_tokens={answer}"


def encoder_for(tokenizer: Any, data: DataSection, positions: int | None) -> Encoder:
    """Return the encoder for the rows of a recipe.

    Args:
        tokenizer: a transformers tokenizer.
        data: lengths, truncation and format.
        positions: the model's longest sequence, or None.

    Raises:
        UsageError: prompt and answer together exceed the model's positions, or the tokenizer has
            no chat template and the recipe asks for it.
    """
    return Encoder(
        tokenizer,
        data.max_prompt_tokens,
        data.max_answer_tokens,
        data.truncate,
        positions,
        chat=data.format == "chat",
    )


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples on the left, so that all answers end in the last column.

    Args:
        examples: at least one.
        pad: the padding token's id; masked everywhere.
    """
    size = max(len(example.tokens) for example in examples)
    keep = max(len(example.tokens) - example.answer_start for example in examples)
    ids = torch.full((len(examples), size), pad, dtype=torch.int64)
    mask = torch.zeros((len(examples), size), dtype=torch.int64)
    labels = torch.full((len(examples), keep), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        answer = length - example.answer_start
        tokens = torch.tensor(example.tokens, dtype=torch.int64)
        ids[row, size - length :] = tokens
        mask[row, size - length :] = 1
        labels[row, keep - answer :] = tokens[example.answer_start :]
    total = sum(len(example.tokens) for example in examples)
    return Batch(ids, mask, positions_of(mask), labels, total)


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left for generation.

    Returns:
        Token ids and attention mask, both int64 [B, S].
    """
    size = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), size), pad, dtype=torch.int64)
    mask = torch.zeros((len(prompts), size), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, size - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, size - len(prompt) :] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Count each row's real tokens from 0; padding gets 0.

    Args:
        mask: int64 [B, S], 1 for real tokens.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
