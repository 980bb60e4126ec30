"""Chat templates: the answer alone is learned, the frame is never cut, nothing begins twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.conversation import Conversation, Turn
from treelora_cli.errors import DataError, UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, collate
from treelora_cli.models.generate import generate
from treelora_cli.recipe import LoraSection, ModelSection

# Begin token and turn ends of its own, as Llama 3 has them.
TURNS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# No begin token; an empty chain of thought before the answer, as Qwen 3 has it.
THOUGHT = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}[think]\n[/think]\n{% endif %}{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Roles must alternate, a space leads the answer, the end token ends it, as in Mistral's.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }}[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FRAMES = {
    "turns": (TURNS, "<s><turn>user\n", "<end>\n<turn>assistant\n", "", "<end>"),
    "thought": (
        THOUGHT,
        "<turn>user\n",
        "<end>\n<turn>assistant\n[think]\n[/think]\n",
        "",
        "<end>",
    ),
    "brackets": (BRACKETS, "<s>[INST] ", "[/INST]", " ", "</s>"),
}
TEXT = st.text(min_size=1, max_size=60).filter(lambda text: text.strip() != "")
ASCII = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=80)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory):
    """One tokenizer for each template, and one without a template under ``none``."""
    from support import make_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    made = {"none": AutoTokenizer.from_pretrained(folder)}
    for name, (template, *_) in FRAMES.items():
        made[name] = AutoTokenizer.from_pretrained(folder)
        made[name].add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
        made[name].chat_template = template
    return made


@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, answer=TEXT, name=st.sampled_from(sorted(FRAMES)))
def test_the_answer_alone_is_learned(tokenizers, prompt: str, answer: str, name: str) -> None:
    tokenizer = tokenizers[name]
    _, opening, closing, lead, end = FRAMES[name]
    example = Encoder(tokenizer, 4000, 4000, chat=True).example(prompt, answer, "SEPARATOR")
    read, learned = example.tokens[: example.answer_start], example.tokens[example.answer_start :]
    assert tokenizer.decode(read) == f"{opening}{prompt}{closing}"
    assert tokenizer.decode(learned[:-1]) == f"{lead}{answer}"
    assert tokenizer.convert_ids_to_tokens(learned[-1]) == end
    assert list(read).count(tokenizer.bos_token_id) == opening.count("<s>")
    assert collate([example], tokenizer.pad_token_id).labels.tolist() == list(learned)
    assert not example.truncated


@settings(max_examples=60, deadline=None)
@given(
    prompt=ASCII,
    room=st.integers(1, 60),
    truncate=st.sampled_from(["left", "middle"]),
    name=st.sampled_from(sorted(FRAMES)),
)
def test_only_the_users_text_is_cut(tokenizers, prompt, room: int, truncate, name: str) -> None:
    tokenizer = tokenizers[name]
    _, opening, closing, _, _ = FRAMES[name]
    frame = len(tokenizer(opening + closing, add_special_tokens=False)["input_ids"])
    longest = frame + 4 + room
    encoder = Encoder(tokenizer, longest, 50, truncate, chat=True)
    example = encoder.example(prompt, "Antwort")
    read = tokenizer.decode(example.tokens[: example.answer_start])
    assert example.answer_start <= longest
    assert read.startswith(opening)
    assert read.endswith(closing)
    kept = read[len(opening) : len(read) - len(closing)]
    assert kept
    assert example.truncated == (kept != prompt)
    if truncate == "left":
        assert prompt.endswith(kept)
    else:
        split = next(at for at in range(len(kept) + 1) if prompt.startswith(kept[: len(kept) - at]))
        assert prompt.endswith(kept[len(kept) - split :])
    assert tokenizer.decode(example.tokens[example.answer_start : -1]).strip() == "Antwort"


TALK = Conversation(
    [
        Turn("system", "Be brief."),
        *(Turn(role, f"{role} {n}") for n in (1, 2, 3) for role in ("user", "assistant")),
        Turn("user", "user 4"),
    ]
)


@pytest.mark.parametrize(
    ("longest", "truncate", "kept"),
    [
        (900, "left", ["user 1", "assistant 1", "user 2", "assistant 2", "user 3", "user 4"]),
        (80, "left", ["user 3", "assistant 3", "user 4"]),
        (80, "middle", ["user 1", "assistant 1", "user 4"]),
        (50, "left", ["user 4"]),
    ],
)
def test_whole_exchanges_go_before_words_do(tokenizers, longest, truncate, kept) -> None:
    encoder = Encoder(tokenizers["turns"], longest, 50, truncate, chat=True)
    ids, cut = encoder.prompt(TALK)
    text = tokenizers["turns"].decode(ids)
    assert cut == (longest < 900)
    assert text.startswith("<s><turn>system\nBe brief.<end>\n<turn>user\n")
    assert text.endswith("<turn>user\nuser 4<end>\n<turn>assistant\n")
    said = [turn.text for turn in TALK.turns[1:] if f"\n{turn.text}<end>" in text]
    assert [part for part in said if part in kept] == kept
    assert len(ids) <= longest


def test_a_system_text_is_never_lost(tokenizers) -> None:
    """This template knows no system turn: its text begins the first turn of the user."""
    encoder = Encoder(tokenizers["brackets"], 900, 50, chat=True)
    text = tokenizers["brackets"].decode(encoder.prompt(TALK)[0])
    assert text.startswith(
        "<s>[INST] Be brief.\n\nuser 1[/INST] assistant 1</s>[INST] user 2[/INST]"
    )


def test_a_conversation_is_a_transcript_in_plain_format(tokenizers) -> None:
    encoder = Encoder(tokenizers["none"], 900, 50)
    text = tokenizers["none"].decode(encoder.prompt(TALK)[0])
    assert text.startswith("<s>System: Be brief.\nUser: user 1\nAssistant: assistant 1\n")
    assert text.endswith("\nUser: user 4\nAssistant:")


def test_the_template_begins_and_takes_no_position_beside_its_own(tokenizers) -> None:
    Encoder(tokenizers["turns"], 95, 32, positions=128, chat=True)
    with pytest.raises(UsageError, match="128 positions"):
        Encoder(tokenizers["turns"], 96, 32, positions=128, chat=True)


def test_a_prompt_does_not_depend_on_the_day(tokenizers, monkeypatch) -> None:
    dated = "{{ strftime_now('%d %b %Y') }} " + TURNS
    monkeypatch.setattr(tokenizers["turns"], "chat_template", dated)
    encoder = Encoder(tokenizers["turns"], 900, 50, chat=True)
    assert tokenizers["turns"].decode(encoder.prompt("q")[0]).startswith("26 Jul 2024 <s>")


def test_what_cannot_be_rendered_is_refused(tokenizers) -> None:
    with pytest.raises(UsageError, match="has no chat template") as missing:
        Encoder(tokenizers["none"], 100, 50, chat=True)
    assert "data.format=plain" in missing.value.hint
    twice = Conversation([Turn("user", "a"), Turn("user", "b")])
    with pytest.raises(DataError, match=r"user, user.*roles must alternate"):
        Encoder(tokenizers["brackets"], 900, 50, chat=True).prompt(twice)
    with pytest.raises(UsageError, match="nothing is left for the prompt") as short:
        Encoder(tokenizers["turns"], 18, 50, chat=True).prompt("a long question " * 9)
    assert "--set data.max_prompt_tokens=" in short.value.hint


def test_generation_ends_where_the_turn_ends(tiny_model: Path) -> None:
    """The tiny model knows no turn end: take a token that it says as one."""
    model = AdaptedModel(
        load_backbone(ModelSection(name=str(tiny_model), device="cpu")), LoraSection(rank=4), 0
    )
    encoder = Encoder(model.backbone.tokenizer, 100, 20)
    whole = generate(model, encoder, ["What is the colour"], 12, 1)[0]
    ids = model.backbone.tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = next(token for token in ids if token != ids[0])
    encoder.stops = [stop, encoder.eos]
    cut = generate(model, encoder, ["What is the colour"], 12, 1)[0]
    assert whole.startswith(cut.removesuffix(model.backbone.tokenizer.decode([stop])))
    assert len(cut) < len(whole)
