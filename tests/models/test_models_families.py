"""Every family trains, is read back from disk by stock PEFT, and answers as a plain loop does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support import make_checkpoint, make_t5, make_tokenizer, toy_arguments
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, FalconConfig

from treelora_cli.engine.adapters import load_adapter
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.models.likelihood import score_batches
from treelora_cli.recipe import DataSection, LoraSection, ModelSection
from treelora_cli.rundir.layout import RunDir

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "gemma": {},
    "gemma2": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 64},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-7b": {"multi_query": True},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
SIDED = ["t5", "mt5", "umt5"]
EVERYWHERE = ["lora.targets=all-linear"]
TARGETS = {"qwen3_moe": [*EVERYWHERE, "lora.dropout=0"]}
"""All-linear takes the experts too, for which PEFT knows no dropout."""
QUICK = {"gpt2", "mistral", "t5"}
"""Those of the default suite; llama is everywhere else."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LABELS = ["A", "B", "perhaps"]


def families(names: list[str]) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in names
    ]


def checkpoint(folder: Path, family: str, *, chat: bool = False) -> Path:
    if family in SIDED:
        return make_t5(folder, family)
    if family.startswith("falcon"):
        make_falcon(folder, **CAUSAL[family])
    else:
        make_checkpoint(folder, family, **CAUSAL[family])
    if chat:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make_falcon(folder: Path, **settings: Any) -> None:
    """Its config computes some of what others are told, and refuses to be told."""
    make_tokenizer(folder)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        FalconConfig(max_position_embeddings=256, **sizes | tokens | settings)
    ).save_pretrained(folder)


def read_back(folder: Path, adapter: Path) -> Any:
    """Base and adapter by transformers and PEFT alone."""
    config = json.loads((folder / "config.json").read_text())
    kind = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    return PeftModel.from_pretrained(kind.from_pretrained(folder), adapter).eval()


def logits_behind(model: Any, read: list[int], said: list[int]) -> torch.Tensor:
    """The logits of the next token, and those before it, of one row without padding or cache."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            sides = {"input_ids": read, "decoder_input_ids": start + said}
        else:
            sides = {"input_ids": read + said}
        tensors = {key: torch.tensor([value]) for key, value in sides.items()}
        return model(**tensors, use_cache=False).logits[0, -len(said) - 1 :]


def greedy(model: Any, encoder: Encoder, prompt: str, longest: int) -> str:
    """The likeliest token, one after the other."""
    read, said = encoder.prompt(prompt)[0], []
    for _ in range(longest):
        said.append(int(logits_behind(model, read, said)[-1].argmax()))
        if said[-1] in encoder.stops:
            break
    return encoder.tokenizer.decode(said, skip_special_tokens=True)


def summed(model: Any, encoder: Encoder, prompt: str, label: str) -> float:
    """The log-probability of a label behind a prompt."""
    example = encoder.example(prompt, label, " ")
    read, said = example.tokens[: example.answer_start], example.tokens[example.answer_start :]
    chances = logits_behind(model, list(read), list(said)).log_softmax(-1)
    return sum(float(chances[at, token]) for at, token in enumerate(said))


def check_family(treelora, family: str, data: Path, place: Path, *, chat: bool) -> None:
    folder, run = checkpoint(place / "model", family, chat=chat), place / "run"
    settings = ["optim.lr=0.03", "optim.epochs=3", "eval.zero_shot=false", "eval.before=false"]
    settings += TARGETS.get(family, [])
    settings += ["data.format=chat"] if chat else []
    more = [part for pair in settings for part in ("--set", pair)]
    arguments = toy_arguments(folder, data, run, "alpha", "--method", "seqlora", *more)
    outcome = treelora(*arguments, "--set", "stream.checkpoint_steps=100")
    assert outcome.code == 0, outcome
    steps = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["kind"] == "step"]
    assert losses[-1] < losses[0], "it learns"
    task = run / "tasks" / "000-alpha"
    (answers,) = (task / "predictions").glob("*.jsonl")
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    model = read_back(folder, task / "adapter")
    section = DataSection(
        max_prompt_tokens=96, max_answer_tokens=8, format="chat" if chat else "plain"
    )
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    encoder = encoder_for(backbone.tokenizer, section, backbone.positions, encodes=backbone.encodes)
    alone = [greedy(model, encoder, line["prompt"], 9) for line in lines]
    assert alone == [line["prediction"] for line in lines]
    check_likelihood(backbone, run, encoder, model, [line["prompt"] for line in lines])


def check_likelihood(
    backbone: Any, run: Path, encoder: Encoder, model: Any, prompts: list[str]
) -> None:
    lora = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["lora"]
    adapted = AdaptedModel(backbone, LoraSection(**lora), 0)
    before = adapted.snapshot()
    adapted.restore(load_adapter(RunDir.open(run), 0, "alpha"))
    assert any(not torch.equal(before[key], now) for key, now in adapted.snapshot().items())
    for batch in score_batches(adapted, encoder, prompts, LABELS, " ", 4):
        for at, scores in batch.items():
            naive = [summed(model, encoder, prompts[at], label) for label in LABELS]
            assert scores.tolist() == pytest.approx(naive, abs=2e-3)


@pytest.mark.parametrize("family", families([*CAUSAL, *SIDED]))
def test_a_family_is_trained_read_back_and_asked(
    treelora, toy_data: Path, tmp_path: Path, family: str
) -> None:
    check_family(treelora, family, toy_data, tmp_path, chat=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(CAUSAL))
def test_a_family_in_its_chat_template(
    treelora, toy_data: Path, tmp_path: Path, family: str
) -> None:
    check_family(treelora, family, toy_data, tmp_path, chat=True)


def test_dropout_on_experts_is_explained(treelora, toy_data: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "mixtral")
    more = ["--set", "lora.targets=all-linear", "--set", "lora.dropout=0.1"]
    for dry in ([], ["--dry-run"]):
        run = tmp_path / "run"
        outcome = treelora(*toy_arguments(folder, toy_data, run, "alpha", *more, *dry))
        assert outcome.code == 2, outcome
        assert "lora.targets" in outcome.err and "lora.dropout=0" in outcome.err
        assert not run.exists()
