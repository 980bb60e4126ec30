"""Text to tokens: prompt and answer are tokenised apart, so labels mask exactly the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from treelora_cli.conversation import turns_of
from treelora_cli.errors import UsageError
from treelora_cli.models.chat import ChatTemplate
from treelora_cli.models.readback import send
from treelora_cli.recipe import DataSection

IGNORED = -100

# Up to this many positions for one of an answer, filling up costs less than a mask would.
_FILLED = 1.25


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
    """Examples of one forward pass: padded below one another, or packed behind one another.

    Padding stands at the end, where no token of a causal model sees it: no mask is needed, and the
    fastest attention kernels take none.

    Attributes:
        input_ids: int64 [B, S]; B = 1 when packed.
        position_ids: int64 [1, S] when packed: positions count anew from 0 where an example begins,
            which is how transformers knows the examples apart. None when padded: 0 .. S - 1.
        kept: the positions whose next token is predicted, as transformers' ``logits_to_keep`` takes
            them: int64 [B, P], or bool [B, S] where answers differ much in length, or int64 [K]
            when packed. Position p predicts token p + 1.
        labels: int64 [n], what is predicted there, in the order of the logits; ``IGNORED`` where a
            position only fills up.
        tokens: real tokens in the batch.
        answer_tokens: tokens the loss is taken over, end tokens included.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    kept: Tensor
    labels: Tensor
    tokens: int
    answer_tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        positions = self.position_ids
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            position_ids=None if positions is None else send(positions, device),
            kept=send(self.kept, device),
            labels=send(self.labels, device),
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
    """Pad examples at their end.

    Args:
        examples: at least one; each has a prompt, for a first token is predicted by nothing.
        pad: the padding token's id; no other token sees it.
    """
    lengths = [len(example.tokens) for example in examples]
    answers = [len(example.tokens) - example.answer_start for example in examples]
    # NumPy: on arrays this small a torch operation is mostly overhead, and every step pays it.
    ids = np.full((len(examples), max(lengths)), pad)
    for row, example in enumerate(examples):
        ids[row, : lengths[row]] = example.tokens
    longest = max(answers)
    if longest * len(examples) > _FILLED * sum(answers):
        # A mask makes an accelerator's host wait for its size, but computes nothing in vain.
        columns = np.arange(ids.shape[1])
        starts = np.array([example.answer_start - 1 for example in examples])[:, None]
        ends = np.array(lengths)[:, None] - 1
        kept = (columns >= starts) & (columns < ends)
        labels = np.concatenate([ex.tokens[ex.answer_start :] for ex in examples])
    else:
        kept = np.zeros((len(examples), longest), np.int64)
        filled = np.full((len(examples), longest), IGNORED)
        for row, example in enumerate(examples):
            kept[row, : answers[row]] = np.arange(example.answer_start - 1, lengths[row] - 1)
            filled[row, : answers[row]] = example.tokens[example.answer_start :]
        labels = filled.reshape(-1)
    tensors = [torch.from_numpy(array) for array in (ids, kept, labels)]
    return Batch(tensors[0], None, tensors[1], tensors[2], sum(lengths), sum(answers))


def pack(examples: Sequence[Example], pad: int) -> Batch:
    """Put examples behind one another, without padding.

    Args:
        examples: at least one; each has a prompt, for a first token is predicted by nothing.
        pad: not used; there is no padding.
    """
    ids = torch.tensor([token for example in examples for token in example.tokens])
    positions = torch.cat([torch.arange(len(example.tokens)) for example in examples])
    starts = torch.tensor([example.answer_start for example in examples])
    lengths = torch.tensor([len(example.tokens) for example in examples])
    at = (positions >= starts.repeat_interleave(lengths)).nonzero().squeeze(1)
    return Batch(ids.unsqueeze(0), positions.unsqueeze(0), at - 1, ids[at], len(ids), len(at))


def pad_prompts(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token sequences on the left.

    Returns:
        Token ids and attention mask, both int64 [B, S].
    """
    size = max(len(tokens) for tokens in sequences)
    ids = torch.tensor([[pad] * (size - len(tokens)) + list(tokens) for tokens in sequences])
    starts = torch.tensor([size - len(tokens) for tokens in sequences]).unsqueeze(1)
    return ids, (torch.arange(size) >= starts).long()


def positions_of(mask: Tensor) -> Tensor:
    """Count each row's real tokens from 0; padding gets 0.

    Args:
        mask: int64 [B, S], 1 for real tokens.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
