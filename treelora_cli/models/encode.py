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
        tokens: begin token if the tokenizer has one, prompt, answer, end token. For an
            encoder-decoder the encoder's, prompt and end token, then the decoder's, answer and end
            token.
        answer_start: index of the first answer token.
        truncated: True if prompt or answer was cut.
        apart: True if the answer is a decoder's and does not go on from the prompt.
    """

    tokens: tuple[int, ...]
    answer_start: int
    truncated: bool
    apart: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """The tokens of the prompt and of the answer."""
        return self.answer_start, len(self.tokens) - self.answer_start


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one forward pass: padded below one another, or packed behind one another.

    Padding stands at the end, where no token of a causal model sees it: no mask is needed, and the
    fastest attention kernels take none. An encoder sees it, and is given a mask.

    Attributes:
        input_ids: int64 [B, S]; B = 1 when packed. Whole rows, or what the encoder reads of them.
        position_ids: int64 [1, S] when packed: positions count anew from 0 where an example begins,
            which is how transformers knows the examples apart. None when padded: 0 .. S - 1.
        kept: the positions whose next token is predicted, as transformers' ``logits_to_keep`` takes
            them: int64 [B, P], or bool [B, S] where answers differ much in length, or int64 [K]
            when packed. Position p predicts token p + 1. None for an encoder-decoder: the decoder
            predicts all that it is given.
        labels: int64 [n], what is predicted there, in the order of the logits; ``IGNORED`` where a
            position only fills up. For an encoder-decoder B rows of the longest answer.
        tokens: real tokens in the batch.
        answer_tokens: tokens the loss is taken over, end tokens included.
        starts: int64 [B], the tokens of each row's prompt, from the row's beginning. None when
            packed.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    kept: Tensor | None
    labels: Tensor
    tokens: int
    answer_tokens: int
    starts: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            position_ids=_sent(self.position_ids, device),
            kept=_sent(self.kept, device),
            labels=send(self.labels, device),
            starts=_sent(self.starts, device),
        )

    def prompt_mask(self) -> Tensor:
        """Return int64 [B, S], 1 for the tokens of the prompts.

        Raises:
            ValueError: the rows are packed.
        """
        if self.starts is None:
            raise ValueError("the prompts of packed rows do not begin at the row's beginning")
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (columns < self.starts.unsqueeze(1)).long()


def _sent(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else send(tensor, device)


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
        encodes: the model is an encoder-decoder: prompts are read with the end token behind them
            and no begin token, and nothing stands between prompt and answer, for the decoder begins
            anew.

    Attributes:
        end: the token learned after every answer.
        stops: the tokens at which generation ends.

    Raises:
        UsageError: prompt and answer exceed the model's positions, there is no chat template to
            use, or it is asked of an encoder-decoder.
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
        encodes: bool = False,
    ) -> None:
        if chat and encodes:
            raise UsageError(
                "data.format chat: an encoder-decoder reads prompts as they are, without turns",
                "use --set data.format=plain, or a causal language model that was tuned for chat",
            )
        self.tokenizer = tokenizer
        self.encodes = encodes
        self.chat = ChatTemplate(tokenizer) if chat else None
        has_bos = self.chat is None and not encodes and tokenizer.bos_token_id is not None
        self.bos = [tokenizer.bos_token_id] if has_bos else []
        self.eos = tokenizer.eos_token_id
        self.end = self.eos if self.chat is None else self.chat.end
        self.stops = sorted({self.end, self.eos})
        self.pad = tokenizer.pad_token_id
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.truncate = truncate
        if positions is not None:
            self._check_lengths(positions)

    def _check_lengths(self, positions: int) -> None:
        prompt, answer = self.max_prompt_tokens, self.max_answer_tokens
        if self.encodes:
            for side, longest in (("prompt", prompt), ("answer", answer)):
                if longest + 1 > positions:
                    raise UsageError(
                        f"data.max_{side}_tokens {longest} + end token = {longest + 1}, but either "
                        f"side of the model has {positions} positions",
                        f"e.g. --set data.max_{side}_tokens={positions - 1}",
                    )
            return
        needed = len(self.bos) + prompt + answer + 1
        if needed > positions:
            raise UsageError(
                f"data.max_prompt_tokens {prompt} + data.max_answer_tokens {answer} + begin and "
                f"end tokens = {needed}, but the model has {positions} positions",
                f"e.g. {_lengths_that_fit(positions - len(self.bos) - 1, answer)}",
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
        return [*self.bos, *ids, self.eos] if self.encodes else self.bos + ids, cut

    def example(self, prompt: str, answer: str, separator: str = "") -> Example:
        """Tokenise a training row; the answer is kept and always ends with the end token.

        Args:
            prompt: the prompt.
            answer: what is learned.
            separator: the text between them; in a chat the template says what stands there, and
                for an encoder-decoder nothing does, nor white space that begins the answer.
        """
        read, prompt_cut = self.prompt(prompt)
        lead = separator if self.chat is None else self.chat.lead
        text = answer.lstrip() if self.encodes else lead + answer
        # An end token within an answer would teach the model to stop there.
        learned = self._ids(text, literal=True)
        answer_cut = len(learned) > self.max_answer_tokens
        learned = [*learned[: self.max_answer_tokens], self.end]
        cut = prompt_cut or answer_cut
        return Example((*read, *learned), len(read), cut, apart=self.encodes)


def _lengths_that_fit(room: int, answer: int) -> str:
    """Return the settings to try: a shorter prompt, or both where the answer takes most of it."""
    if room - answer >= room // 4:
        return f"--set data.max_prompt_tokens={room - answer}"
    answer = max(1, room // 4)
    prompt = max(1, room - answer)
    return f"--set data.max_prompt_tokens={prompt} --set data.max_answer_tokens={answer}"


def encoder_for(
    tokenizer: Any, data: DataSection, positions: int | None, *, encodes: bool = False
) -> Encoder:
    """Return the encoder for the rows of a recipe.

    Args:
        tokenizer: a transformers tokenizer.
        data: lengths, truncation and format.
        positions: the model's longest sequence, or None.
        encodes: whether the model is an encoder-decoder.

    Raises:
        UsageError: prompt and answer exceed the model's positions, or the recipe asks for a chat
            template where there is none, or of an encoder-decoder.
    """
    return Encoder(
        tokenizer,
        data.max_prompt_tokens,
        data.max_answer_tokens,
        data.truncate,
        positions,
        chat=data.format == "chat",
        encodes=encodes,
    )


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples at their end, prompts and answers apart where they are.

    Args:
        examples: at least one; each has a prompt, for a first token is predicted by nothing.
        pad: the padding token's id; no other token sees it.
    """
    if examples[0].apart:
        return _collate_sides(examples, pad)
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
    prompts = np.array([example.answer_start for example in examples])
    found = [torch.from_numpy(array) for array in (ids, kept, labels, prompts)]
    return Batch(found[0], None, found[1], found[2], sum(lengths), sum(answers), found[3])


def _collate_sides(examples: Sequence[Example], pad: int) -> Batch:
    """Pad prompts for the encoder, and answers for the decoder."""
    prompts, answers = zip(*(example.sides for example in examples), strict=True)
    ids = np.full((len(examples), max(prompts)), pad)
    labels = np.full((len(examples), max(answers)), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : prompts[row]] = example.tokens[: prompts[row]]
        labels[row, : answers[row]] = example.tokens[prompts[row] :]
    found = [torch.from_numpy(array) for array in (ids, labels.reshape(-1), np.array(prompts))]
    tokens = sum(prompts) + sum(answers)
    return Batch(found[0], None, None, found[1], tokens, sum(answers), found[2])


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


def pad_prompts(
    sequences: Sequence[Sequence[int]], pad: int, *, left: bool = True
) -> tuple[Tensor, Tensor]:
    """Pad token sequences: on the left where answers go on from them, else on the right.

    Returns:
        Token ids and attention mask, both int64 [B, S].
    """
    lengths = [len(tokens) for tokens in sequences]
    size = max(lengths)
    ids, mask = np.full((len(lengths), size), pad), np.zeros((len(lengths), size), np.int64)
    for row, tokens in enumerate(sequences):
        place = slice(size - lengths[row], size) if left else slice(lengths[row])
        ids[row, place], mask[row, place] = tokens, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def positions_of(mask: Tensor) -> Tensor:
    """Count each row's real tokens from 0; padding gets 0.

    Args:
        mask: int64 [B, S], 1 for real tokens.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
