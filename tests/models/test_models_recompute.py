"""Gradient checkpointing changes no gradient, and memory is what the estimate says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import make_checkpoint

from treelora_cli.engine.drive_ddp import Forward
from treelora_cli.errors import DataError, UsageError
from treelora_cli.models import outline as outlining
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.forward import answer_loss, answer_loss_of
from treelora_cli.models.outline import outline
from treelora_cli.models.recompute import recompute_layers
from treelora_cli.recipe import LoraSection, ModelSection

ROWS = 2
TOKENS = 128


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


def adapted(
    folder: Path, dropout: float, *, again: bool, targets: object = "auto", **more: object
) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu", **more))
    if again:
        recompute_layers(backbone.model)
    model = AdaptedModel(backbone, LoraSection(rank=4, dropout=dropout, targets=targets), 0)
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


def check_estimate(folder: Path, dropout: float, targets: object, **more: object) -> None:
    """The estimate is within a third of what autograd keeps, with and without checkpointing."""
    lora = LoraSection(rank=4, dropout=dropout, targets=targets)
    sizes = outline(ModelSection(name=str(folder), device="cpu", **more), lora)

    def estimate(*, checkpointing: bool) -> int:
        return sizes.layers.activation_bytes(
            ROWS * TOKENS,
            TOKENS,
            sizes.itemsize,
            dropout=dropout > 0,
            checkpointing=checkpointing,
        )

    plain = kept_bytes(adapted(folder, dropout, again=False, targets=targets, **more))
    assert 0.75 < estimate(checkpointing=False) / plain < 1.35
    # The layer that is computed again is not among what the forward pass keeps.
    spared = kept_bytes(adapted(folder, dropout, again=True, targets=targets, **more))
    last_norm = 4 * sizes.layers.hidden * ROWS * TOKENS
    one_layer = (estimate(checkpointing=False) - last_norm) / sizes.layers.layers
    assert 0.75 < (estimate(checkpointing=True) - one_layer) / spared < 1.35


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_the_estimate_is_what_autograd_keeps(
    tiny_model: Path, dtype: str, attention: str, dropout: float, targets: str
) -> None:
    check_estimate(tiny_model, dropout, targets, dtype=dtype, attention=attention)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_what_knows_eager_attention_only(tmp_path: Path, dtype: str) -> None:
    """Gemma 2 caps its scores, which torch's kernels do not."""
    check_estimate(make_checkpoint(tmp_path, "gemma2"), 0.1, "auto", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_the_estimate_of_experts(tmp_path: Path, dtype: str, targets: object) -> None:
    folder = make_checkpoint(tmp_path, "mixtral", num_local_experts=32, num_experts_per_tok=2)
    check_estimate(folder, 0.0, targets, dtype=dtype)


def test_widths_of_experts(tmp_path: Path) -> None:
    """Of a layer: two of six experts for a token, in each gate and up 128, read 64, given 32."""
    settings = {"num_local_experts": 6, "num_experts_per_tok": 2}
    section = ModelSection(name=str(make_checkpoint(tmp_path, "mixtral", **settings)), device="cpu")
    frozen = outline(section, LoraSection(targets=("q_proj",))).layers
    assert (frozen.experts, frozen.merged, frozen.inputs) == (2 * (128 + 64 + 32), 0, 32)
    every = outline(section, LoraSection(targets="all-linear", dropout=0.0)).layers
    # What gate and up read, 32, and what down reads, 64; q, k, v and o read 32 each.
    assert every.experts == frozen.experts + 2 * (32 + 64)
    assert every.merged == 6 * 3 * 32 * 64
    assert every.inputs == 4 * 32


def test_an_outline_knows_how_attention_is_computed(tiny_model: Path, tmp_path: Path) -> None:
    gemma = make_checkpoint(tmp_path, "gemma2")

    def layers(folder: Path, **more: object):
        return outline(ModelSection(name=str(folder), device="cpu", **more), LoraSection()).layers

    assert not layers(tiny_model).eager
    assert layers(tiny_model, attention="eager").eager
    found = layers(gemma)
    assert found.eager and found.capped
    with pytest.raises(DataError, match="scaled_dot_product_attention"):
        layers(gemma, attention="sdpa")


@pytest.mark.parametrize("refuses", [False, True])
def test_an_outline_chooses_attention_as_loading_does(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """An architecture may refuse what was chosen for us, and gets its default then."""
    asked: list[object] = []
    real = outlining.auto_class

    class Picky:
        @staticmethod
        def from_config(config, *, attn_implementation, **more):
            asked.append(attn_implementation)
            if attn_implementation == "flash_attention_2":
                if refuses:
                    raise ValueError("it does not support Flash Attention 2 yet")
                attn_implementation = "eager"  # to tell whose model is measured
            return real(config).from_config(config, attn_implementation=attn_implementation, **more)

    monkeypatch.setattr(outlining, "auto_class", lambda config: Picky)
    monkeypatch.setattr(outlining, "choose_attention", lambda *given: "flash_attention_2")
    section = ModelSection(name=str(tiny_model), device="cpu")
    assert outline(section, LoraSection()).layers.eager == (not refuses)
    assert asked == ["flash_attention_2", None][: 1 + refuses]
    if refuses:
        with pytest.raises(DataError, match="does not support Flash"):
            outline(section.model_copy(update={"attention": "flash_attention_2"}), LoraSection())


def test_a_choice_that_was_refused_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes what it is asked for into the config, and then refuses it."""
    monkeypatch.setattr(outlining, "choose_attention", lambda *given: "flash_attention_2")
    folder = make_checkpoint(tmp_path, "bloom")
    assert outline(ModelSection(name=str(folder), device="cpu"), LoraSection()).layers.eager


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
