"""The adapter: PEFT's own layout, blocks in depth order, exact snapshots, any architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import make_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from treelora_cli.engine.adapters import write_adapter
from treelora_cli.engine.store import save_adapter
from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, collate
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.generate import generate
from treelora_cli.models.snapshot import Snapshot
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


def random_adapter(model: AdaptedModel, seed: int) -> Snapshot:
    """An adapter of the live one's rank; the live one is left as it was."""
    live = model.snapshot()
    shake(model, seed)
    found = model.snapshot()
    model.restore(live)
    return found


def logits(model: AdaptedModel | torch.nn.Module, names: list[str] | None = None) -> torch.Tensor:
    """What a causal model or an encoder-decoder says to two rows of tokens.

    With ``names``, each row is answered by the adapter of that name.
    """
    peft = model.peft if isinstance(model, AdaptedModel) else model
    rows: dict[str, object] = {"input_ids": torch.tensor([[5, 9, 40, 7, 11], [8, 8, 30, 2, 6]])}
    if peft.config.is_encoder_decoder:
        rows["decoder_input_ids"] = torch.tensor([[0, 12, 31], [0, 5, 77]])
    if names is not None:
        rows["adapter_names"] = names
    with torch.no_grad():
        found: torch.Tensor = peft(**rows).logits
    return found


@pytest.fixture(params=["tiny_model", "tiny_t5"])
def base(request: pytest.FixtureRequest) -> Path:
    """A causal model with grouped-query attention, and an encoder-decoder."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def test_a_sum_in_two_slots_is_one_adapter_and_a_dense_change(base: Path) -> None:
    model = adapt(base, alpha=6)
    parts = [random_adapter(model, seed) for seed in (1, 2, 3)]
    alone = logits(model)
    model.stand_on(None)
    for part in parts[:2]:
        model.restore(part)
        model.stand_on(model.answer())
    model.restore(parts[2])
    two_slots = logits(model)
    whole = model.answer()
    for key, value in whole.items():
        assert value.equal(torch.cat([part[key] for part in parts], int(".lora_B." in key)))
    with model.beside([whole]) as (name,):
        one_slot = logits(model, [name, name])
    auto = AutoModelForSeq2SeqLM if model.peft.config.is_encoder_decoder else AutoModelForCausalLM
    dense = auto.from_pretrained(base).eval()
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for part in parts:
            for key in part:
                if ".lora_A." in key:
                    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    B = part[key.replace("lora_A", "lora_B")]
                    weights[f"{module}.weight"] += 6 / 4 * B @ part[key]
    torch.testing.assert_close(two_slots, one_slot, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two_slots, logits(dense), rtol=1e-4, atol=1e-5)
    assert (two_slots - alone).abs().max() > 0.05
    model.reset()
    model.stand_on(None)
    torch.testing.assert_close(logits(model), alone, rtol=0, atol=0)


def test_standing_on_a_sum_touches_nothing_else(base: Path) -> None:
    model = adapt(base, dropout=0.1)
    past, live = random_adapter(model, 1), random_adapter(model, 2)
    model.restore(live)
    model.freeze_adapter(A=True, B=False)
    frozen = {name for name, p in model.peft.named_parameters() if not p.requires_grad}
    factors = [(name, id(p)) for name, p in model.named_factors("A")]
    keys, state = list(model.trainable()), torch.get_rng_state()
    for under in (past, None, past, model.answer(), None):
        model.stand_on(under)
        found = {name for name, p in model.peft.named_parameters() if not p.requires_grad}
        assert {name for name in found if "t000past" not in name} == frozen
        assert all(not p.requires_grad for p in model.past_parameters.values())
        assert set(model.past_parameters) == (set() if under is None else set(under))
        assert list(model.trainable()) == keys
        assert [(name, id(p)) for name, p in model.named_factors("A")] == factors
        assert all(model.snapshot()[key].equal(live[key]) for key in live)
    assert torch.get_rng_state().equal(state)


def test_the_sum_under_the_live_adapter_is_not_trained(base: Path) -> None:
    model = adapt(base)
    past = random_adapter(model, 1)
    model.stand_on(past)
    encoder = Encoder(model.backbone.tokenizer, 50, 10, encodes=model.backbone.encodes)
    batch = collate([encoder.example("What is the colour?", "blue")], 0)
    before = answer_loss(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        answer_loss(model, batch).backward()
        optimizer.step()
    assert answer_loss(model, batch) < before
    for key, parameter in model.past_parameters.items():
        assert parameter.grad is None
        assert parameter.equal(past[key])


def test_adapters_of_other_ranks_answer_beside_a_sum(base: Path) -> None:
    """Each row is its own adapter's alone, as if nothing stood under the live one."""
    model = adapt(base)
    parts = [random_adapter(model, seed) for seed in (1, 2)]
    said = []
    for part in parts:
        model.restore(part)
        said.append(logits(model))
        model.stand_on(model.answer())
    whole = model.answer()
    model.reset()
    flags = [p.requires_grad for p in model.peft.parameters()]
    latest = logits(model)
    with model.beside([parts[0], whole]) as names:
        mixed = logits(model, names)
    torch.testing.assert_close(mixed[0], said[0][0], rtol=1e-4, atol=1e-5)
    with model.beside([whole]) as (name,):
        alone = logits(model, [name, name])
    torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), latest, rtol=0, atol=0)
    assert [p.requires_grad for p in model.peft.parameters()] == flags
    with model.as_base():
        nothing = logits(model)
    model.stand_on(None)
    torch.testing.assert_close(logits(model), nothing, rtol=0, atol=0)


def test_a_stored_sum_loads_with_plain_peft(base: Path, tmp_path: Path) -> None:
    model = adapt(base, rank=3, alpha=5)
    model.stand_on(random_adapter(model, 1))
    model.stand_on(model.answer())
    model.restore(random_adapter(model, 2))
    whole = model.answer()
    write_adapter(tmp_path / "adapter", model.config_document(whole), whole)
    seq2seq = model.peft.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    plain = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "adapter").eval()
    config = plain.peft_config["default"]
    assert config.r == 9
    assert config.lora_alpha == 15
    assert config.task_type == ("SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_a_strange_sum_is_refused(tiny_model: Path) -> None:
    model, other = adapt(tiny_model), adapt(tiny_model, targets=("q_proj",))
    with pytest.raises(UsageError, match="does not fit"):
        model.stand_on(other.snapshot())
