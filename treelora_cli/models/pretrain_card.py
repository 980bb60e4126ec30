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

{description}"""


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card for a base.

    Args:
        facts: the fields of ``PretrainSettings`` and ``PretrainResult`` by name, and
            ``description``: what the text holds, in Markdown.
    """
    by_time = facts["minutes"] is not None
    limits = [f"--tokens {facts['tokens']}"] if facts["tokens"] is not None else []
    if by_time:
        limits.append(f"--minutes {facts['minutes']:g}")
    note = "; a limit in minutes gives that up" if by_time else ""
    return _CARD.format(**facts, limit=" ".join(limits), time_note=note)
