"""The shipped base and its tokenizer: it loads, is small, and writes any text back."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.models.pretrain import shipped_base
from treelora_cli.tasks import miniature

FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_base())


def test_the_files_are_few_and_small():
    files = list(shipped_base().iterdir())
    assert {file.name for file in files} == FILES
    assert sum(file.stat().st_size for file in files) < 8_000_000


def test_the_model_loads_and_names_no_machine():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shipped_base())
    assert model.dtype == torch.float32
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings >= 512
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (
        0, 1, 2,
    )  # fmt: skip
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    for file in FILES - {"model.safetensors"}:
        text = (shipped_base() / file).read_text(encoding="utf-8")
        assert not re.search(r"/(?:work|opt|root|tmp|home)/", text)


def test_the_base_writes_the_text_it_read(tokenizer):
    """Trained weights, not random ones: it goes on with a fact of the lexicon."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shipped_base())
    prompt = tokenizer("Every copper is a", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt]])
    with torch.no_grad():
        following = int(model(input_ids=ids).logits[0, -1].argmax())
    assert tokenizer.decode([following]) == " metal"


def test_special_tokens_are_fixed_and_never_added(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    ids = tokenizer("3 ants have 18 legs.", add_special_tokens=False)["input_ids"]
    assert not {0, 1, 2} & set(ids)


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    if any(special in text for special in ("<pad>", "<s>", "</s>")):
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "老实说，手机真的很好。",
        "Grüsse aus Zürich: «schön»",
        "x = [1, 2]\n\tif a != b :",
        "🙂 naïve",
    ],
)
def test_chinese_german_code_and_signs_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_answers_are_short_tokens_and_fit_their_limits(tokenizer):
    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert all(count(f" {letter}") == 1 for letter in "ABC")
    assert all(count(f" {number}") == 1 for number in range(1, 17))
    for name in miniature.NAMES:
        task = miniature.load(name)
        for rows in task.splits.values():
            for row in rows:
                assert count(task.separator + row.answer) + 1 <= task.max_answer_tokens
                assert count(row.prompt) + task.max_answer_tokens + 2 <= 128


def test_the_card_says_how_the_base_was_made():
    card = (shipped_base() / "README.md").read_text(encoding="utf-8")
    config = json.loads((shipped_base() / "config.json").read_text(encoding="utf-8"))
    assert re.search(r"treelora builtin pretrain --out DIR --tokens \d+ --seed \d+", card)
    assert f"hidden {config['hidden_size']}, {config['num_hidden_layers']} layers" in card
    assert re.search(r"Training loss over the last steps: \d\.\d+", card)
    assert Path(shipped_base()).name == "builtin"
