"""Weights of the base that are trained: names, snapshots, and the base as it came underneath."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support import TEXTS, make_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.features import prompt_features
from treelora_cli.models.opened import base_parameters, check_opened
from treelora_cli.models.outline import outline
from treelora_cli.models.snapshot import WEIGHTS
from treelora_cli.recipe import LoraSection, ModelSection

ALL = LoraSection(rank=4, dropout=0.0, targets="all-linear")


def adapt(folder: Path, lora: LoraSection = ALL) -> AdaptedModel:
    return AdaptedModel(load_backbone(ModelSection(name=str(folder), device="cpu")), lora, 0)


def everything(name: str) -> bool:
    return True


def shake(parameters: list[torch.nn.Parameter], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model: object) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 30, 7, 200, 11]])
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "tied", "t5"])
def test_every_weight_is_opened_once_under_its_name_in_the_base(
    tmp_path: Path, tiny_t5: Path, kind: str
) -> None:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    tied = kind == "tied"
    folder = tiny_t5 if kind == "t5" else make_checkpoint(tmp_path, tie_word_embeddings=tied)
    bare = dict(auto.from_pretrained(folder).named_parameters())
    model = adapt(folder)
    opened = model.open_weights(everything)
    assert opened.keys() == bare.keys()
    assert all(torch.equal(opened[name], bare[name]) for name in bare)
    assert ("lm_head.weight" in opened) == (kind == "llama")
    assert len({id(parameter) for parameter in opened.values()}) == len(opened)
    keys = {WEIGHTS + name for name in bare}
    assert set(model.more_parameters) == keys
    assert set(model.snapshot()) == keys | set(model.live_parameters)
    assert keys < set(model.trainable())


def test_some_weights_are_opened(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    opened = model.open_weights(lambda name: ".mlp.gate_proj." in name)
    assert list(opened) == [f"model.layers.{n}.mlp.gate_proj.weight" for n in range(2)]
    trained = {id(p) for p in model.peft.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.parameters()}
    model.freeze_adapter()
    assert model.parameters() == list(opened.values())


def test_what_cannot_be_trained_is_refused(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    with pytest.raises(UsageError, match="no weight of the base is chosen"):
        model.open_weights(lambda name: "nothing" in name)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(UsageError, match=r"model\.norm\.weight is quantised"):
            check_opened("model.norm.weight", dtype)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UsageError, match="rounding"):
            check_opened("model.norm.weight", dtype)
    check_opened("model.norm.weight", torch.float32)
    weight = model.backbone.model.model.norm.weight
    weight.data = weight.data.to(torch.bfloat16)
    with pytest.raises(UsageError, match=r"model\.norm\.weight is in bfloat16"):
        model.open_weights(everything)
    assert not model.more_parameters
    assert not weight.requires_grad


@pytest.mark.parametrize("folder", ["tiny_model", "tiny_t5"])
def test_the_base_alone_is_as_it_came(request: pytest.FixtureRequest, folder: str) -> None:
    path: Path = request.getfixturevalue(folder)
    model = adapt(path)
    base = logits(load_backbone(ModelSection(name=str(path), device="cpu")).model)
    model.open_weights(everything)
    part = model.add_part("gate", torch.ones(3))
    shake(model.parameters())
    trained, flags = model.snapshot(), [p.requires_grad for p in model.peft.parameters()]
    changed = logits(model.peft)
    assert not torch.allclose(changed, base, atol=1e-3)
    for fails in (False, True):
        try:
            with model.as_base():
                assert torch.equal(logits(model.peft), base)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            pass
        assert torch.equal(logits(model.peft), changed)
        assert all(torch.equal(value, trained[key]) for key, value in model.snapshot().items())
    assert [p.requires_grad for p in model.peft.parameters()] == flags
    assert part.requires_grad


def test_routing_features_know_no_training(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    encoder = Encoder(model.backbone.tokenizer, 40, 8)
    before = prompt_features(model, encoder, TEXTS)
    model.open_weights(everything)
    shake(model.parameters())
    assert torch.equal(prompt_features(model, encoder, TEXTS), before)


def test_snapshots_hold_weights_and_put_them_back(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    model.open_weights(everything)
    model.add_part("gate", torch.ones(3))
    shake(model.parameters())
    one, said = model.snapshot(), logits(model.peft)
    shake(model.parameters(), 2)
    assert not torch.equal(logits(model.peft), said)
    model.restore(one)
    assert torch.equal(logits(model.peft), said)
    assert all(torch.equal(value, one[key]) for key, value in model.answer().items())
    with pytest.raises(UsageError, match="does not fit this model"):
        model.restore({key: one[key] for key in model.live_parameters})


@pytest.mark.parametrize("seed", [None, 3])
def test_a_reset_touches_the_adapter_alone(tiny_model: Path, seed: int | None) -> None:
    model = adapt(tiny_model)
    start = model.snapshot()
    model.open_weights(everything)
    model.add_part("gate", torch.ones(3))
    shake(model.parameters())
    before = model.snapshot()
    model.reset(seed)
    for key, value in model.snapshot().items():
        if key in start:
            same = torch.equal(value, start[key])
            assert same == (seed is None or ".lora_B." in key)
        else:
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("folder", ["tiny_model", "tiny_t5"])
def test_an_outline_counts_opened_weights(request: pytest.FixtureRequest, folder: str) -> None:
    section = ModelSection(name=str(request.getfixturevalue(folder)), device="cpu")

    def learns(key: str) -> bool:
        return key.startswith(WEIGHTS) or ".lora_B." in key

    sizes = outline(section, ALL, learns)
    model = AdaptedModel(load_backbone(section), ALL, 0)
    model.open_weights(everything)
    model.freeze_adapter(A=True, B=False)
    stored = sum(value.numel() for value in model.snapshot().values())
    assert sizes.trainable == model.trainable_count()
    assert sizes.opened == sizes.parameters
    assert sizes.stored_bytes == 4 * stored
    assert sizes.checkpoint_bytes == 4 * stored + 8 * model.trainable_count()
    assert sizes.training_bytes == 4 * stored + 12 * model.trainable_count()
    plain = outline(section, ALL)
    assert (
        plain.trainable == plain.adapter == sum(p.numel() for p in model.live_parameters.values())
    )
    assert plain.opened == 0


def test_names_are_the_bases_whatever_peft_wraps(tiny_model: Path) -> None:
    bare = AutoModelForCausalLM.from_pretrained(tiny_model)
    names = [name for name, _ in bare.named_parameters()]
    from treelora_cli.models.targets import lora_config

    assert list(base_parameters(get_peft_model(bare, lora_config(ALL, bare)))) == names
