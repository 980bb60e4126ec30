"""Gradient checkpointing changes no gradient, and memory is what the estimate says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import make_checkpoint

from treelora_cli.engine.drive_ddp import Forward
from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.forward import answer_loss, answer_loss_of
from treelora_cli.models.outline import outline
from treelora_cli.models.recompute import recompute_layers
from treelora_cli.recipe import LoraSection, ModelSection

ROWS = 4
TOKENS = 48


class Before:
    """A condition: the same soft prompt before every row, in the graph."""

    width = 3
    rows = None

    def __init__(self, soft: torch.nn.Parameter) -> None:
        self.soft = soft

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.soft.expand(len(ids), -1, -1)

    @contextmanager
    def answering(self, ids: torch.Tensor, mask: torch.Tensor):
        yield


def adapted(folder: Path, dropout: float, *, again: bool, **more: object) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu", **more))
    if again:
        recompute_layers(backbone.model)
    model = AdaptedModel(backbone, LoraSection(rank=4, dropout=dropout), 0)
    torch.manual_seed(1)
    for name, parameter in model.live_parameters.items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(apart: bool):
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length in (20, 24, 31, 40):
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        examples.append(Example(tuple(tokens), length - 3, truncated=False, apart=apart))
    return collate(examples, 0)


def soft(model: AdaptedModel) -> None:
    width = model.backbone.model.config.hidden_size
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(5))
    model.condition = Before(model.add_part("soft", values))


def gradients(model: AdaptedModel, loss: Callable[[AdaptedModel], torch.Tensor]) -> list:
    model.peft.train()
    torch.manual_seed(7)
    found = loss(model)
    found.backward()
    return [found.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "soft", "ddp", "t5"])
def test_gradients_are_those_without(
    tiny_model: Path, tiny_t5: Path, kind: str, dropout: float
) -> None:
    def loss(model: AdaptedModel) -> torch.Tensor:
        if kind == "soft":
            soft(model)
        rows = batch(kind == "t5")
        if kind == "ddp":
            return answer_loss_of(Forward(model)(rows), rows)
        return answer_loss(model, rows)

    folder = tiny_t5 if kind == "t5" else tiny_model
    models = [adapted(folder, dropout, again=again) for again in (False, True)]
    plain, spared = (gradients(model, loss) for model in models)
    assert all(one.abs().max() > 0 for one in plain)
    for one, other in zip(plain, spared, strict=True):
        assert torch.equal(one, other)


def kept_bytes(model: AdaptedModel) -> int:
    """What autograd keeps of a forward pass, the model's own parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.peft.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.peft.train()
    ids = torch.randint(3, 300, (ROWS, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.peft(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(
    tiny_model: Path, dtype: str, attention: str, dropout: float
) -> None:
    more = {"dtype": dtype, "attention": attention}
    lora = LoraSection(rank=4, dropout=dropout)
    sizes = outline(ModelSection(name=str(tiny_model), device="cpu", **more), lora)

    def estimate(*, checkpointing: bool) -> int:
        return sizes.layers.activation_bytes(
            ROWS * TOKENS,
            TOKENS,
            sizes.itemsize,
            dropout=dropout > 0,
            eager=attention == "eager",
            checkpointing=checkpointing,
        )

    plain = kept_bytes(adapted(tiny_model, dropout, again=False, **more))
    assert 0.75 < estimate(checkpointing=False) / plain < 1.35
    # The layer that is computed again is not among what the forward pass keeps.
    spared = kept_bytes(adapted(tiny_model, dropout, again=True, **more))
    last_norm = 4 * sizes.layers.hidden * ROWS * TOKENS
    one_layer = (estimate(checkpointing=False) - last_norm) / sizes.layers.layers
    assert 0.75 < (estimate(checkpointing=True) - one_layer) / spared < 1.35


def test_layers_are_seen_through_fused_and_transposed_matrices(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folder = make_checkpoint(tmp_path, "gpt2", **sizes)
    found = outline(ModelSection(name=str(folder), device="cpu"), LoraSection()).layers
    # c_attn 96, c_proj 32, c_fc 128, c_proj 32; PEFT adapts c_attn, which reads 32.
    assert (found.outputs, found.widest, found.inputs, found.layers) == (288, 128, 32, 2)


def test_both_halves_of_an_encoder_decoder_are_one_depth(tiny_t5: Path) -> None:
    found = outline(ModelSection(name=str(tiny_t5), device="cpu"), LoraSection()).layers
    # Encoder: q, k, v, o 32 each, wi 64, wo 32; decoder: q, k, v, o once more.
    assert found.layers == 2
    assert found.outputs == (224 + 352) / 2


def test_an_architecture_that_cannot_says_so() -> None:
    class Old(torch.nn.Module):
        supports_gradient_checkpointing = False

    with pytest.raises(UsageError, match="Old cannot compute its layers again"):
        recompute_layers(Old())
