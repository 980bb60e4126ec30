"""How much memory a training pass takes, from the shapes of a model's layers.

With a frozen base a backward pass needs, of every layer and token (s bytes an entry of the base's
dtype, H hidden width):

* what every linear module gives, and the widest once more behind its nonlinearity:
  ``s (outputs + widest)``;
* what the two norms read, in float32, and what attention gives: ``8 H + s H``;
* what LoRA reads, in float32 (5 bytes with dropout: its mask): ``4 inputs`` or ``5 inputs``;
* with eager attention the weights of every head in float32, and in s bytes where that is another:
  ``heads S 4`` or ``heads S (4 + s)``, S the longest row, and ``heads S s`` more where scores are
  capped by a tanh; the other kernels keep none;
* of each of the experts that a token goes through, what its first matrix gives, what its last one
  reads and gives: ``s (first + read + H)``; what an adapted one reads once more, ``s inputs``.

LoRA on experts is added to their matrices: each layer keeps the sums, ``s`` bytes for every entry
of all its experts, whatever the tokens. The norm behind the last layer keeps ``4 H`` more. With
gradient checkpointing each layer keeps its input, ``s H``, and one layer at a time the rest.

These are soft bounds. A test compares those of Llama, Gemma 2 (eager, capped) and Mixtral with what
autograd keeps, to a third. Tried once on tiny models, Qwen's, OLMoE's, gpt-oss's and Granite's with
experts were as near, GPT-NeoX's and Bloom's a half to two thirds too much, and GPT-2's and T5's a
fifth to two fifths of what those keep, which drop out inside the base and compute their GELU in
many steps. Temporary buffers of kernels, fragments and the CUDA context (0.3 to 1 GB) come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

_TAKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
"""What configs call the number of experts that a token goes through."""

Widths = dict[str, tuple[int, int]]
"""Linear modules by name: how many values each reads and gives."""


Stacked = dict[str, tuple[int, int, float]]
"""Experts by the module that holds them: how many, how many a token goes through, and the widths
between layers that one of them has, summed as in ``s (first + read + H)``."""


@dataclass(frozen=True)
class LayerSizes:
    """Widths of the layers that a token goes through; those of the mean layer.

    Attributes:
        layers: layers a token goes through; of an encoder-decoder those of the deeper side.
        hidden: width between layers.
        outputs: widths of all linear modules' outputs in a layer, summed.
        widest: the widest of them.
        heads: attention heads.
        inputs: widths of what the adapted modules of a layer read, summed.
        experts: widths that the experts of a layer keep of a token, summed.
        merged: entries of the experts' matrices that LoRA is added to in a layer.
        eager: whether attention is computed in the open.
        capped: whether its scores go through a tanh.
    """

    layers: int
    hidden: int
    outputs: float
    widest: int
    heads: int
    inputs: float
    experts: float
    merged: float
    eager: bool
    capped: bool

    def activation_bytes(
        self, tokens: int, longest: int, itemsize: int, *, dropout: bool, checkpointing: bool
    ) -> int:
        """Return what a forward pass keeps for its backward pass, in bytes; see the module.

        Args:
            tokens: of the pass, padding counted.
            longest: tokens of its longest row.
            itemsize: bytes of an entry in the base's dtype.
            dropout: whether LoRA drops out.
            checkpointing: whether layers are computed again.
        """
        widths = self.outputs + self.widest + self.experts + self.hidden
        token = itemsize * widths + 8 * self.hidden + (5 if dropout else 4) * self.inputs
        if self.eager:
            token += self.heads * longest * self._score_bytes(itemsize)
        layer = tokens * token + itemsize * self.merged
        if checkpointing:
            kept = layer + tokens * self.layers * itemsize * self.hidden
        else:
            kept = layer * self.layers
        return int(kept + tokens * 4 * self.hidden)

    def _score_bytes(self, itemsize: int) -> int:
        """Return what a head keeps of a token for every token it looks at."""
        return 4 + (itemsize if itemsize < 4 else 0) + (itemsize if self.capped else 0)


def layer_sizes(
    config: Any, widths: Widths, stacked: Stacked, adapter: Mapping[str, torch.Tensor]
) -> LayerSizes:
    """Summarise the widths of a model's layers.

    Args:
        config: the built model's, which knows how attention is computed.
        widths: as ``linear_widths`` reads them.
        stacked: as ``expert_widths`` reads them.
        adapter: the adapter's matrices by the key PEFT saves them under.
    """
    eager = config._attn_implementation == "eager"
    config = config.get_text_config()
    # The number behind a stack's name is the layer's; an encoder-decoder has two stacks.
    count = max(1, len({_layer(name) for name in (*widths, *stacked)}))
    inputs = read = merged = 0.0
    for key, matrix in adapter.items():
        name, mark, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        # LoRA on the second of a module's parameters is wrapped around that on the first.
        holder = stacked.get(name.removesuffix(".base_layer"))
        if mark and name in widths:
            inputs += widths[name][0]
        elif mark and holder is not None:
            experts, taken, _ = holder
            wide = matrix.shape[1]
            read += taken * wide
            merged += experts * wide * adapter[key.replace(".lora_A.", ".lora_B.")].shape[0]
    return LayerSizes(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        outputs=sum(given for _, given in widths.values()) / count,
        widest=max((given for _, given in widths.values()), default=0),
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        inputs=inputs / count,
        experts=(sum(taken * width for _, taken, width in stacked.values()) + read) / count,
        merged=merged / count,
        eager=eager,
        capped=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def expert_widths(model: Any) -> Stacked:
    """Return how many experts each module within a layer holds, and how wide they are.

    transformers stacks the matrices of a layer's experts in parameters of three dimensions, the
    experts' first. An architecture that does not say how many of them a token goes through is taken
    to send it through one.

    Args:
        model: a transformers model without adapters, on any device.
    """
    config = model.config.get_text_config()
    said = (getattr(config, name, None) for name in _TAKEN)
    taken = next((int(count) for count in said if count), 1)
    found = {}
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        shapes = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3]
        if _layer(name) is None or not shapes or any(shape[0] != count for shape in shapes):
            continue
        hidden = int(config.hidden_size)
        inner = sum(shape[1] * shape[2] for shape in shapes) / hidden
        found[name] = (int(shapes[0][0]), taken, inner + hidden)
    return found


def linear_widths(model: Any) -> Widths:
    """Return how many values each linear module within a layer reads and gives.

    Args:
        model: a transformers model without adapters, on any device. Its output layer and its
            embeddings are in no layer.
    """
    found = {}
    for name, module in model.named_modules():
        if _layer(name) is None:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's
            found[name] = (module.nx, module.nf)
    return found


def _layer(name: str) -> str | None:
    """Return the name of the layer that a module is in, up to its first number."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])
