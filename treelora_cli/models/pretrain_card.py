"""The model card that ``pretrain`` writes beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
# The built-in base

A Llama of {parameters:,} parameters (hidden {hidden}, {layers} layers, {heads} heads, MLP {mlp},
tied embeddings, {positions} positions; float32) with a byte-level BPE of {vocabulary} tokens. It
exists so that `treelora` runs with no network. It knows a few hundred words of synthetic text
and nothing of the world: a score made with it says whether a method learns and forgets, not how
good the method is on real data.

## How it was made

    treelora builtin pretrain --out DIR {limit} --seed {seed}

The same command gives the same bytes with the same package versions and kind of processor (one
thread by default{time_note}).

- Text read: {tokens_read:,} tokens in {steps:,} steps of {batch} x {length} tokens; documents are
  drawn from the seed without end, each between a begin and an end token.
- Training loss over the last steps: {loss:.3f} nats a token (the text is generated, so no
  held-out text was kept apart).
- Matrices: Muon, rate {rate}, momentum 0.95, weight decay 0.05. Embedding and norms: AdamW, rate
  {rate_rest}, betas 0.9 / 0.95. Constant rate, then linear to zero from half-way; clipping at 1.
- Tokenizer: trained on {documents:,} other documents of the same kinds, in the same command.

## What it read

All text comes from the package's own generator (`treelora_cli/models/pretrain_text.py`); nothing
was collected. The kinds of document, most frequent first: stories of sums that end with the result
as a sentence, parts of things and their products ("3 ants have 18 legs."), meetings with shuffled
notes, code lines, German sentences (hard or easy ones, and "reduziert heisst senkt."), short
reading questions on other matter, words said twice, groups of living things and metals, Chinese
opinions with the stance as a sentence, policy sentences ("That means tight money."), and single
instruction lines without any input.

## What it did not read, and what that does not rule out

- No prompt of a built-in task, and no answer in a built-in task's format. While text is generated,
  a document is dropped if the input text of any default row (train, eval or test, without its
  instruction) occurs in it.
- The facts behind the tasks are in the text on purpose, in other words: the base has read that
  ants have six legs and that tin is a metal. The words of the tasks, their single sentences and
  their instruction lines (alone) occur too. Arithmetic questions such as "What is 6 times 3?" are
  answered by a sentence.
- So a zero-shot score near nothing is a matter of format, not of knowledge.
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card for a base.

    Args:
        facts: the fields of ``PretrainSettings`` and ``PretrainResult`` by name.
    """
    by_time = facts["minutes"] is not None
    limits = [f"--tokens {facts['tokens']}"] if facts["tokens"] is not None else []
    if by_time:
        limits.append(f"--minutes {facts['minutes']:g}")
    note = "; a limit in minutes gives that up" if by_time else ""
    return _CARD.format(**facts, limit=" ".join(limits), time_note=note)
