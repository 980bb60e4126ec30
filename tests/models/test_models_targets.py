"""Which modules get an adapter where the recipe leaves it open."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import make_checkpoint
from transformers import AutoModelForCausalLM

from treelora_cli.models.targets import lora_config
from treelora_cli.recipe import LoraSection

EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
}


def adapted(model: torch.nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the adapter's matrices."""
    found = get_peft_model(model, config)
    return [name for name, _ in found.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "qwen2", "gemma2"])
def test_auto_is_what_peft_takes_by_itself(tmp_path, kind) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    names = adapted(ours, lora_config(LoraSection(), ours))
    assert names
    assert names == adapted(theirs, LoraConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["0.self_attn.q_proj", "0.self_attn.v_proj", "0.self_attn.k_proj"], {"q_proj", "v_proj"}),
        (["0.qkv_proj", "0.o_proj"], {"qkv_proj"}),
        (["encoder.q", "encoder.k", "encoder.v", "v_proj"], {"q", "v"}),
    ],
)
def test_query_and_value_by_whatever_name(names: list[str], taken: set[str]) -> None:
    config = SimpleNamespace(model_type="nobody's", is_encoder_decoder=False)
    model = SimpleNamespace(config=config, named_modules=lambda: [(name, None) for name in names])
    assert lora_config(LoraSection(), model).target_modules == taken


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mixture_of_experts_gets_query_and_value(tmp_path, kind) -> None:
    folder = make_checkpoint(tmp_path / kind, kind, **EXPERTS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = adapted(model, lora_config(LoraSection(), model))
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    assert modules == {"q_proj", "v_proj"}
    assert len(names) == 2 * 2 * 2  # A and B of two modules in two layers


def test_a_model_without_them_is_left_to_peft() -> None:
    config = SimpleNamespace(model_type="nobody's", is_encoder_decoder=False)
    unknown = SimpleNamespace(config=config, named_modules=lambda: [("a.q_proj", None)])
    assert lora_config(LoraSection(), unknown).target_modules is None
    assert lora_config(LoraSection(targets=("b",)), unknown).target_modules == {"b"}
