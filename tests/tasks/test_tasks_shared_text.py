"""What a task's prompts share is found, cut at words, and taken off; odd rows do not spoil it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.conversation import Conversation, Turn
from treelora_cli.tasks.shared_text import shared_parts, strip_shared

BODIES = ["Rates rise.", "who won?", "Ähre", "7 + 5", "北京很大", "x", "(yes)", "Zoo; zebra", "q!"]
START, END = "Say what it is.\nOption: good, bad \nText: ", "\nAnswer:"


def test_instruction_and_cue_are_found() -> None:
    prompts = [f"{START}{body}{END}" for body in BODIES]
    assert shared_parts(prompts) == (START, END)
    assert [strip_shared(prompt, (START, END)) for prompt in prompts] == BODIES


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="abc 日本.\n", max_size=6), min_size=2, max_size=8),
    st.text(alphabet="xy 日.\n", max_size=9),
    st.text(alphabet="xy 日.\n", max_size=9),
)
def test_what_is_left_and_what_is_taken_make_the_prompt(
    bodies: list[str], start: str, end: str
) -> None:
    prompts = [start + body + end for body in bodies]
    parts = shared_parts(prompts, share=1.0)
    for prompt in prompts:
        rest = strip_shared(prompt, parts)
        assert prompt == parts[0] + rest + parts[1]
    assert not parts[0][-1:].isalnum() and not parts[1][:1].isalnum()


def test_words_stay_whole() -> None:
    prompts = ["Rate the prose now", "Rate the prologue now", "Rate the probe now"]
    assert shared_parts(prompts) == ("Rate the ", " now")
    chinese = [f"判断态度：{body}" for body in ("文本甲", "文本乙", "文本丙")]
    assert shared_parts(chinese)[0] == "判断态度："


def test_odd_rows_do_not_spoil_what_the_others_share() -> None:
    prompts = [f"{START}{body}{end}{END}" for end in ".!" for body in BODIES]
    odd = [*prompts, "no instruction at all"]
    assert shared_parts(odd) == (START, END)
    assert shared_parts([*prompts[:9], "odd"])[0] == START, "nine of ten are enough"
    assert shared_parts(odd, share=1.0) == ("", "")
    assert strip_shared(odd[-1], (START, END)) == "no instruction at all"
    few = [*prompts[:4], "other", "another"]
    assert shared_parts(few) == ("", ""), "two of six are more than odd"


def test_an_odd_row_loses_what_it_shares() -> None:
    parts = ("Solve it.\nQuestion: ", ".\nAnswer:")
    assert strip_shared("Solve it.\nQuestion: how?\nAnswer:", parts) == "how?"
    assert strip_shared("Solve it.\nQuery: how.\nAnswer:", parts) == "Query: how"
    assert strip_shared("Solving is fun", parts) == "Solving is fun"


def test_the_two_parts_never_overlap() -> None:
    assert shared_parts(["same. ", "same. ", "same. "]) == ("same. ", "")
    assert strip_shared("a b ", ("a b ", " b ")) == ""


def test_little_to_learn_from() -> None:
    assert shared_parts([]) == ("", "")
    assert shared_parts(["only one"]) == ("", "")
    with pytest.raises(ValueError, match="share"):
        shared_parts(["a", "b"], share=0.5)


def test_a_conversation_is_its_text() -> None:
    prompts = [Conversation([Turn("user", f"Sum up: {body}")]) for body in BODIES]
    assert shared_parts(prompts) == ("User: Sum up: ", "\nAssistant:")
    left = strip_shared(prompts[0], shared_parts(prompts))
    assert left == BODIES[0] and type(left) is str
