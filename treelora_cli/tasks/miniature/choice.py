"""Miniature choice tasks: stance, policy tone and science groups; the answer is a letter."""

from __future__ import annotations

import random

from treelora_cli.tasks.miniature import lexicon
from treelora_cli.tasks.miniature.drawing import Miniature

LETTERS = ("A", "B", "C")
_OPPOSITE = {"支持": "反对", "反对": "支持", "中立": "支持"}
_TONES = ("easy", "tight", "quiet")
_TWO_TARGETS = 0.1


def stance_text(rng: random.Random, stance: str, target: str) -> str:
    """Return a short Chinese text that takes the stance towards the target."""
    first, second = rng.sample(lexicon.STANCE_CLAUSES[stance], 2)
    opening = rng.choice(lexicon.STANCE_OPENINGS)
    return f"{opening}{target}{first}，{second}。"


def draw_stance(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw a target with a text; one in ten texts also judges another target the other way."""
    stances = tuple(lexicon.STANCE_CLAUSES)
    stance = rng.choice(stances)
    target, other = rng.sample(lexicon.STANCE_TARGETS, 2)
    text = stance_text(rng, stance, target)
    if rng.random() < _TWO_TARGETS:
        text = f"{other}{rng.choice(lexicon.STANCE_CLAUSES[_OPPOSITE[stance]])}。{text}"
    return f"{target}\n文本：{text}", LETTERS[stances.index(stance)]


def policy_text(rng: random.Random, tone: str) -> str:
    """Return a sentence on monetary policy of the given tone."""
    first, second = rng.sample(lexicon.POLICY_CLAUSES[tone], 2)
    speaker, month = rng.choice(lexicon.POLICY_SPEAKERS), rng.choice(lexicon.POLICY_MONTHS)
    return f"{speaker} said in {month} that {first} and {second}."


def draw_policy(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw a sentence on monetary policy and the letter of its tone."""
    tone = rng.choice(_TONES)
    return policy_text(rng, tone), LETTERS[_TONES.index(tone)]


def draw_science(rng: random.Random, split: str) -> tuple[str, str]:
    """Draw two members of a group; train and the other splits use different members."""
    groups = tuple(lexicon.SCIENCE_GROUPS)
    group = rng.choice(groups)
    members = lexicon.SCIENCE_GROUPS[group]
    held = lexicon.SCIENCE_HELD_OUT
    pool = members[:-held] if split == "train" else members[-held:]
    first, second = rng.sample(pool, 2)
    asked = rng.choice(("{} and {}", "both {} and {}", "{} or {}", "{} as well as {}"))
    question = f"Which group fits {asked.format(first, second)}?"
    return question, LETTERS[groups.index(group)]


STANCE = Miniature(
    name="C-STANCE",
    metric="accuracy",
    language="zh",
    max_answer_tokens=4,
    draw=draw_stance,
    frame="判断文本对对象的态度：A.支持，B.反对，C.中立。\n对象：{text}\nAnswer:",
    labels=LETTERS,
)
POLICY = Miniature(
    name="FOMC",
    metric="accuracy",
    language="en",
    max_answer_tokens=4,
    draw=draw_policy,
    frame="What is the policy stance? A. dovish, B. hawkish, C. neutral.\nText: {text}\nAnswer:",
    labels=LETTERS,
)
SCIENCE = Miniature(
    name="ScienceQA",
    metric="accuracy",
    language="en",
    max_answer_tokens=4,
    draw=draw_science,
    frame="Choose an answer. A. animal, B. plant, C. metal.\nQuestion: {text}\nAnswer:",
    labels=LETTERS,
)
