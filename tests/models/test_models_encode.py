"""Labels mask exactly the answer, the end token is always there, nothing of the answer is lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import IGNORED, Encoder, Example, collate, pad_prompts
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.generate import generate
from treelora_cli.recipe import LoraSection, ModelSection


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> AdaptedModel:
    model = AdaptedModel(
        load_backbone(ModelSection(name=str(tiny_model), device="cpu")), LoraSection(rank=4), 0
    )
    for parameter in model.parameters():  # B is zero at the start; make the adapter matter
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def tokenizer(adapted: AdaptedModel):
    return adapted.backbone.tokenizer


TEXT = st.text(min_size=1, max_size=60).filter(lambda text: text.strip() != "")


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, answer=TEXT)
def test_answer_is_what_is_learned(tokenizer, prompt: str, answer: str) -> None:
    encoder = Encoder(tokenizer, 4000, 4000)
    example = encoder.example(prompt, answer, " ")
    learned = list(example.tokens[example.answer_start :])
    assert learned[-1] == tokenizer.eos_token_id
    assert learned[:-1] == tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    read = list(example.tokens[: example.answer_start])
    assert read == [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    batch = collate([example], tokenizer.pad_token_id)
    assert batch.labels.tolist() == learned
    assert batch.answer_tokens == len(learned)


@settings(max_examples=60, deadline=None)
@given(
    prompt=TEXT,
    answer=TEXT,
    longest=st.integers(1, 20),
    room=st.integers(1, 20),
    truncate=st.sampled_from(["left", "middle"]),
)
def test_truncation_never_removes_the_answer(
    tokenizer, prompt: str, answer: str, longest: int, room: int, truncate: str
) -> None:
    encoder = Encoder(tokenizer, longest, room, truncate)
    example = encoder.example(prompt, answer)
    whole_prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole_answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    learned = list(example.tokens[example.answer_start :])
    assert learned == [*whole_answer[:room], tokenizer.eos_token_id]
    read = list(example.tokens[1 : example.answer_start])
    assert len(read) == min(len(whole_prompt), longest)
    if truncate == "left" or len(whole_prompt) <= longest:
        assert read == whole_prompt[-longest:]
    else:
        head = longest // 2
        assert read[:head] == whole_prompt[:head]
        assert read[head:] == whole_prompt[len(whole_prompt) - (longest - head) :]
    cut = len(whole_prompt) > longest or len(whole_answer) > room
    assert example.truncated == cut


def test_an_answer_that_names_the_end_token_does_not_end_there(tokenizer) -> None:
    example = Encoder(tokenizer, 100, 100).example("What ends a text?", "</s> and <s> do")
    learned = list(example.tokens[example.answer_start :])
    assert [at for at, token in enumerate(learned) if token in (1, 2)] == [len(learned) - 1]
    assert tokenizer.decode(learned[:-1]) == "</s> and <s> do"


def test_too_long_for_the_model_is_refused(tokenizer) -> None:
    Encoder(tokenizer, 94, 32, positions=128)
    with pytest.raises(UsageError, match="128 positions") as raised:
        Encoder(tokenizer, 95, 32, positions=128)
    assert "max_prompt_tokens=94" in raised.value.hint


@pytest.mark.parametrize("positions", [8, 64, 512, 1024, 1100])
def test_the_lengths_proposed_do_fit(tokenizer, positions: int) -> None:
    """The defaults (1024 + 512) are too long for small models; following the hint must help."""
    with pytest.raises(UsageError) as raised:
        Encoder(tokenizer, 1024, 512, positions=positions)
    proposed = dict(re.findall(r"data\.(\w+)=(\d+)", raised.value.hint))
    lengths = {"max_prompt_tokens": 1024, "max_answer_tokens": 512}
    lengths |= {key: int(value) for key, value in proposed.items()}
    Encoder(tokenizer, *lengths.values(), positions=positions)
    assert lengths["max_prompt_tokens"] >= positions // 4


def test_collate_pads_at_the_end_and_keeps_what_predicts_answers() -> None:
    batch = collate([Example((1, 5, 6, 2), 2, False), Example((1, 9, 2), 1, False)], pad=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 9, 2, 0]]
    assert batch.kept.tolist() == [[1, 2], [0, 1]]
    assert batch.labels.tolist() == [6, 2, 9, 2]
    assert (batch.tokens, batch.answer_tokens) == (7, 4)
    rows = [Example((1, 5, 6, 7, 2), 1, False), Example((1, 9, 4, 2), 1, False)]
    batch = collate(rows, pad=0)  # seven answer tokens in eight places: filled up
    assert batch.kept.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.labels.tolist() == [5, 6, 7, 2, 9, 4, 2, IGNORED]


def test_collate_masks_where_answers_differ_much_in_length() -> None:
    rows = [Example((1, 5, 6, 7, 8, 2), 1, False), Example((1, 9, 2), 2, False)]
    batch = collate(rows, pad=0)  # six answer tokens in ten places
    assert batch.kept.tolist() == [[True] * 5 + [False], [False, True] + [False] * 4]
    assert batch.labels.tolist() == [5, 6, 7, 8, 2, 2]
    assert (batch.tokens, batch.answer_tokens) == (9, 6)


def test_loss_equals_the_sum_over_single_rows_with_full_logits(adapted: AdaptedModel) -> None:
    """Padding, cut output layer and position ids change nothing: compare row by row, in full."""
    encoder = Encoder(adapted.backbone.tokenizer, 100, 20)
    rows = [("a", "b"), ("What is the colour of the sky?", "grün 红"), ("x" * 30, "long " * 5)]
    examples = [encoder.example(prompt, answer) for prompt, answer in rows]
    expected = 0.0
    for example in examples:
        ids = torch.tensor([example.tokens])
        logits = adapted.peft(input_ids=ids).logits[0]
        for position in range(example.answer_start, len(example.tokens)):
            target = torch.tensor(example.tokens[position])
            expected += functional.cross_entropy(logits[position - 1], target).item()
    found = answer_loss(adapted, collate(examples, encoder.pad)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_batch_size_never_changes_an_answer(adapted: AdaptedModel) -> None:
    encoder = Encoder(adapted.backbone.tokenizer, 100, 8)
    prompts = ["a", "What is the colour?", "今天天气怎么样", "x" * 50, "zz zz zz", "Straße"]
    one_by_one = generate(adapted, encoder, prompts, 8, 1)
    assert generate(adapted, encoder, prompts, 8, 4) == one_by_one
    assert generate(adapted, encoder, prompts, 8, 6) == one_by_one
    assert len(set(one_by_one)) > 1


def test_generation_matches_a_plain_greedy_loop(adapted: AdaptedModel) -> None:
    encoder = Encoder(adapted.backbone.tokenizer, 100, 8)
    prompt = "Which letter comes next? A B C"
    ids, _ = encoder.prompt(prompt)
    for _ in range(6):
        best = int(adapted.peft(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(best)
        if best == encoder.eos:
            break
    text = adapted.backbone.tokenizer.decode(
        ids[len(encoder.prompt(prompt)[0]) :], skip_special_tokens=True
    )
    assert generate(adapted, encoder, [prompt], 6, 1) == [text]


def test_pad_prompts() -> None:
    ids, mask = pad_prompts([[1, 2, 3], [4]], pad=0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_models_own_generation_settings_do_not_leak_in(tiny_model: Path, tmp_path) -> None:
    """Hub models bring sampling, penalties and lengths, and transformers fills them in for us."""
    settings = {
        "do_sample": True, "temperature": 5.0, "top_k": 50, "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1, "min_new_tokens": 8, "max_length": 4,
        "bad_words_ids": [[5]], "suppress_tokens": [6, 7], "begin_suppress_tokens": [8],
        "forced_eos_token_id": 2,
    }  # fmt: skip
    folder = Path(shutil.copytree(tiny_model, tmp_path / "opinionated"))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    prompts = ["a", "What is the colour?", "zz zz zz"]
    answers = []
    for place in (tiny_model, folder):
        backbone = load_backbone(ModelSection(name=str(place), device="cpu"))
        model = AdaptedModel(backbone, LoraSection(rank=4), 0)
        encoder = Encoder(backbone.tokenizer, 100, 8)
        answers.append(generate(model, encoder, prompts, 8, 2))
    assert answers[0] == answers[1]
