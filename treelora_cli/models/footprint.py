"""How much memory a training pass takes, from the shapes of a model's layers.

With a frozen base a backward pass needs, of every layer and token (s bytes an entry of the base's
dtype, H hidden width):

* what every linear module gives, and the widest once more behind its nonlinearity:
  ``s (outputs + widest)``;
* what the two norms read, in float32, and what attention gives: ``8 H + s H``;
* what LoRA reads, in float32 (5 bytes with dropout: its mask): ``4 inputs`` or ``5 inputs``;
* with eager attention the weights of every head in float32, and in s bytes where that is another:
  ``heads S 4`` or ``heads S (4 + s)``, S the longest row; the other kernels keep none.

The norm behind the last layer keeps ``4 H`` more. With gradient checkpointing each layer keeps its
input, ``s H``, and one layer at a time the rest.

These are soft bounds. A test compares Llama's with what autograd keeps, to a third; tried once on
tiny models, Qwen's and Gemma's were as near, GPT-NeoX's a half too much, and only a third to a half
of what GPT-2's and T5's keep, which drop out inside the base and compute their GELU in many steps.
Temporary buffers of kernels, fragments and the CUDA context (0.3 to 1 GB) come on top. Experts are
not counted, and an architecture that knows eager attention only needs what eager does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

Widths = dict[str, tuple[int, int]]
"""Linear modules by name: how many values each reads and gives."""


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
    """

    layers: int
    hidden: int
    outputs: float
    widest: int
    heads: int
    inputs: float

    def activation_bytes(
        self,
        tokens: int,
        longest: int,
        itemsize: int,
        *,
        dropout: bool,
        eager: bool,
        checkpointing: bool,
    ) -> int:
        """Return what a forward pass keeps for its backward pass, in bytes; see the module.

        Args:
            tokens: of the pass, padding counted.
            longest: tokens of its longest row.
            itemsize: bytes of an entry in the base's dtype.
            dropout: whether LoRA drops out.
            eager: whether attention is computed in the open.
            checkpointing: whether layers are computed again.
        """
        layer = itemsize * (self.outputs + self.widest + self.hidden) + 8 * self.hidden
        layer += (5 if dropout else 4) * self.inputs
        if eager:
            layer += self.heads * longest * (4 + itemsize if itemsize < 4 else 4)
        inputs_and_one = layer + self.layers * itemsize * self.hidden
        kept = inputs_and_one if checkpointing else layer * self.layers
        return int(tokens * (kept + 4 * self.hidden))


def layer_sizes(config: Any, widths: Widths, adapted: Sequence[str]) -> LayerSizes:
    """Summarise the widths of a model's layers.

    Args:
        config: the model's.
        widths: as ``linear_widths`` reads them.
        adapted: names of the modules that get an adapter.
    """
    config = config.get_text_config()
    # The number behind a stack's name is the layer's; an encoder-decoder has two stacks.
    count = max(1, len({_layer(name) for name in widths}))
    return LayerSizes(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        outputs=sum(given for _, given in widths.values()) / count,
        widest=max((given for _, given in widths.values()), default=0),
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        inputs=sum(widths[name][0] for name in adapted if name in widths) / count,
    )


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
