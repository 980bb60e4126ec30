"""The adapter: PEFT's own layout, blocks in depth order, exact snapshots, any architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import make_checkpoint
from transformers import AutoModelForCausalLM

from treelora_cli.engine.store import save_adapter
from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, collate
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.generate import generate
from treelora_cli.recipe import LoraSection, ModelSection


def adapt(folder: Path, seed: int = 0, **lora: object) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    return AdaptedModel(backbone, LoraSection(**{"rank": 4, **lora}), seed)


def shake(model: AdaptedModel, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def test_blocks_are_layers_in_depth_order(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    assert [block.depth for block in model.blocks] == [0, 1]
    by_name = dict(model.peft.named_parameters())
    for block in model.blocks:
        layer = f"base_model.model.model.layers.{block.depth}.self_attn"
        A = [by_name[f"{layer}.{module}_proj.lora_A.t000.weight"] for module in "qv"]
        assert [id(p) for p in block.A] == [id(p) for p in A]
        assert len(block.B) == 2
    # q and v of rank 4 read 32 features each; grouped-query attention makes their outputs differ.
    assert model.block_widths("A") == (256, 256)
    assert model.block_widths("AB") == (256 + 4 * 32 + 4 * 16,) * 2
    assert model.trainable_count() == sum(model.block_widths("AB"))


def test_only_the_adapter_is_trainable(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    named = model.peft.named_parameters()
    assert all("lora_" in name for name, parameter in named if parameter.requires_grad)


def test_snapshot_and_reset_are_exact(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    start = model.snapshot()
    shake(model)
    changed = model.snapshot()
    assert any(not changed[key].equal(start[key]) for key in start)
    model.reset()
    assert all(model.snapshot()[key].equal(start[key]) for key in start)
    model.restore(changed)
    assert all(model.snapshot()[key].equal(changed[key]) for key in start)


def test_a_stranger_adapter_is_refused(tiny_model: Path) -> None:
    model, other = adapt(tiny_model), adapt(tiny_model, rank=2)
    with pytest.raises(UsageError, match="does not fit"):
        model.restore(other.snapshot())


def test_the_start_depends_on_the_seed_alone(tiny_model: Path) -> None:
    one, same, other = adapt(tiny_model, 5), adapt(tiny_model, 5), adapt(tiny_model, 6)
    assert all(one.snapshot()[key].equal(same.snapshot()[key]) for key in one.snapshot())
    assert any(not one.snapshot()[key].equal(other.snapshot()[key]) for key in one.snapshot())


def test_unknown_targets_are_explained(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"lora\.targets"):
        adapt(tiny_model, targets=("no_such_module",))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma2"])
def test_train_save_and_load_with_plain_peft(tmp_path: Path, model_type: str) -> None:
    """A few steps on each architecture; the saved folder needs PEFT alone for the same logits."""
    folder = make_checkpoint(tmp_path / "base", model_type)
    model = adapt(folder)
    encoder = Encoder(model.backbone.tokenizer, 50, 10)
    batch = collate([encoder.example("What is the colour?", "blue"), encoder.example("a", "b")], 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_adapter(tmp_path / "adapter", model, model.snapshot())
    ids = torch.tensor([encoder.prompt("Which letter?")[0]])
    inside = model.peft(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, inside, rtol=0, atol=0)
    assert isinstance(generate(model, encoder, ["a"], 3, 1)[0], str)


def test_saving_twice_gives_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    model = adapt(tiny_model, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    for name in ("one", "two"):
        save_adapter(tmp_path / name, model, model.snapshot())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
