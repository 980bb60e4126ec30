"""A prompt's features: of the frozen base alone, whatever the batch, and nothing left changed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.features import HEAD, READ, project, prompt_features, shorten
from treelora_cli.recipe import LoraSection, ModelSection

PROMPTS = ["What is it?", "今天天气怎么样？ " * 9, "x", "def add(a, b):\n    return a + b\n" * 3]


def adapt(folder: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    model = AdaptedModel(backbone, LoraSection(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def encoder_of(model: AdaptedModel, prompt_tokens: int = 200) -> Encoder:
    return Encoder(model.backbone.tokenizer, prompt_tokens, 8)


def by_hand(folder: Path, text: str) -> torch.Tensor:
    """One prompt, no padding, no adapter, token by token."""
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        states = base(torch.tensor([[1, *ids]]), output_hidden_states=True).hidden_states
    middle, last = (
        [row / math.sqrt(float((row**2).mean())) for row in state[0]]
        for state in (states[1], states[2])
    )
    views = [sum(middle[1:HEAD]) / len(middle[1:HEAD]), sum(last[1:]) / len(last[1:]), last[-1]]
    return torch.cat(views)


def test_features_are_the_bases_views_of_a_prompt(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    found = prompt_features(model, encoder_of(model), PROMPTS)
    assert found.dtype == torch.float32 and found.shape == (4, 96)
    for row, text in zip(found, PROMPTS, strict=True):
        torch.testing.assert_close(row, by_hand(tiny_model, text), atol=2e-5, rtol=1e-4)
    assert len(encoder_of(model).prompt(PROMPTS[1])[0]) > HEAD, "one prompt is longer than a head"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2", "opt", "bloom", "gpt_neox"])
def test_batches_and_padding_change_nothing(kind: str, tmp_path: Path) -> None:
    model = adapt(make_checkpoint(tmp_path / kind, kind))
    encoder = encoder_of(model)
    model.peft.train()  # GPT-2 and OPT would drop hidden states
    alone = prompt_features(model, encoder, PROMPTS, batch_size=1)
    for size in (2, 3, 8):
        batched = prompt_features(model, encoder, PROMPTS, batch_size=size)
        torch.testing.assert_close(batched, alone, atol=5e-5, rtol=1e-3)


def test_the_adapter_does_not_show_and_stays_as_it_was(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    encoder = encoder_of(model)
    before = model.snapshot()
    trainable = [id(parameter) for parameter in model.parameters()]
    model.peft.train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model.peft.eval()
    live = model.peft(input_ids=ids).logits
    model.peft.train()
    found = prompt_features(model, encoder, PROMPTS)
    assert model.peft.training
    assert [id(parameter) for parameter in model.parameters()] == trainable
    assert all(value.equal(before[key]) for key, value in model.snapshot().items())
    model.peft.eval()
    assert model.peft(input_ids=ids).logits.equal(live), "the adapter answers again"
    model.reset()
    assert prompt_features(model, encoder, PROMPTS).equal(found), "only the base was looked at"


def test_what_is_frozen_stays_frozen(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    for key, parameter in model.live_parameters.items():
        parameter.requires_grad_("lora_A" not in key)
    trainable = [id(parameter) for parameter in model.parameters()]
    prompt_features(model, encoder_of(model), PROMPTS)
    assert [id(parameter) for parameter in model.parameters()] == trainable
    assert len(trainable) == len(model.live_parameters) // 2


def test_no_logits_are_computed(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    calls = []
    head = model.backbone.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: calls.append(1))
    prompt_features(model, encoder_of(model), PROMPTS)
    assert calls == []


def test_what_a_failing_batch_leaves_is_whole(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    model.peft.train()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prompt_features(model, encoder_of(model), PROMPTS, on_batch=stop)
    assert model.peft.training
    assert model.parameters(), "the adapter is on and trainable again"


def test_long_prompts_are_read_at_both_ends(tiny_model: Path) -> None:
    tokens = list(range(1000))
    assert shorten(tokens) == [*range(192), *range(936, 1000)]
    assert len(shorten(tokens)) == READ
    assert shorten(tokens[:READ]) == tokens[:READ]
    model = adapt(tiny_model)
    encoder = encoder_of(model, 2000)
    start, end = "begin " * 200, " the end" * 80
    texts = [start + "a" * 300 + end, start + "b" * 400 + end]
    one, other = prompt_features(model, encoder, texts)
    torch.testing.assert_close(one, other)


def test_a_prompt_without_text_has_features(tiny_model: Path) -> None:
    model = adapt(tiny_model)
    encoder = encoder_of(model)
    encoder.bos = []
    found = prompt_features(model, encoder, ["", "x"])
    assert bool(torch.isfinite(found).all()) and float(found[0].norm()) > 0
    assert prompt_features(model, encoder, []).shape == (0, 0)


def test_wide_features_are_projected_with_fixed_signs() -> None:
    few = torch.randn(3, 512)
    assert project(few) is few
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6000, generator=generator)
    short = project(rows)
    assert short.shape == (20, 512)
    wide, narrow = torch.cdist(rows, rows), torch.cdist(short, short)
    off = ~torch.eye(20, dtype=torch.bool)
    ratio = narrow[off] / wide[off]
    assert float(ratio.min()) > 0.85 and float(ratio.max()) < 1.15
    # Stored statistics depend on these signs: they must never change.
    unit = torch.zeros(1, 6000)
    unit[0, 0] = math.sqrt(512)
    signs = "".join("+" if value > 0 else "-" for value in project(unit)[0, :16].tolist())
    assert signs == "--++--+--+-+----"
