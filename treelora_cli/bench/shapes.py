"""Models with random weights and rows with random tokens, of a given shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from treelora_cli.engine.batches import RowPlan
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import Backbone, choose_attention, choose_dtype
from treelora_cli.models.encode import Example
from treelora_cli.recipe import LoraSection

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
SPECIAL = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    def __str__(self) -> str:
        return f"Llama, hidden {self.hidden} x {self.layers} layers, vocabulary {self.vocab:,}"


TINY = Shape(64, 2, 4, 2, 128, 512)
SMALL = Shape(256, 8, 8, 8, 704, 4096)
LLAMA_1B = Shape(2048, 16, 32, 8, 8192, 128_256)

LORA = LoraSection(rank=8, alpha=32, dropout=0.0, targets=("q_proj", "v_proj"))
"""Rank 8 on query and value, without dropout, so that two arms compute the same numbers."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward pass.

    Attributes:
        count: rows.
        prompt: tokens read of each.
        answer: tokens learned of each.
    """

    count: int
    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.count} x {self.prompt + self.answer} tokens"

    def examples(self, vocab: int, seed: int) -> list[Example]:
        """Return rows of random tokens."""
        return random_examples([(self.prompt, self.answer)] * self.count, vocab, seed)


class SameRows(RowPlan):
    """The same rows in every step, all of them one epoch.

    Args:
        rows: number of rows.
        steps: optimizer steps.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self.steps = self.steps_per_epoch = steps
        self._rows = list(range(rows))

    def rows(self, step: int) -> list[int]:
        """Return all rows."""
        return self._rows


def build(
    shape: Shape,
    device: torch.device,
    seed: int,
    make: Callable[[Backbone, LoraSection, int], AdaptedModel] = AdaptedModel,
    *,
    positions: int = 2048,
) -> AdaptedModel:
    """Return a Llama with random weights that carries a LoRA adapter; a seed gives the same ones.

    Args:
        shape: its sizes.
        device: where it lives; bfloat16 on a GPU that has it, else float32.
        seed: of weights and adapter.
        make: puts the adapter on, as a method's ``build`` does.
        positions: its longest sequence.
    """
    dtype = choose_dtype("auto", device)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=shape is LLAMA_1B,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=choose_attention("auto", device, dtype)
        )
    model.requires_grad_(False)
    model.eval()
    backbone = Backbone(model, number_tokenizer(shape.vocab), str(shape), "random", False, device)
    return make(backbone, LORA, seed)


def number_tokenizer(vocab: int) -> Any:
    """Return a tokenizer whose words are the token numbers: ``"17 4"`` is read as [17, 4].

    Args:
        vocab: number of tokens; the first three are padding, begin and end.
    """
    words = {PAD: 0, BEGIN: 1, END: 2} | {str(at): at for at in range(SPECIAL, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END
    )


def random_examples(lengths: Sequence[tuple[int, int]], vocab: int, seed: int) -> list[Example]:
    """Return rows of random tokens.

    Args:
        lengths: tokens of prompt and answer of each row.
        vocab: the tokens to draw from.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for prompt, answer in lengths:
        tokens = torch.randint(SPECIAL, vocab, (prompt + answer,), generator=generator)
        found.append(Example(tuple(tokens.tolist()), prompt, False))
    return found
