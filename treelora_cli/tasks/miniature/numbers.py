"""Miniature arithmetic tasks: counting parts (a product) and short stories (a sum)."""

from __future__ import annotations

import random

from treelora_cli.tasks.miniature import lexicon
from treelora_cli.tasks.miniature.drawing import Miniature

_FRAME = "Solve the following math problem.\nQuestion: {text}\nAnswer:"


def draw_parts(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw a question on the parts of several equal things, and the product."""
    thing, count = rng.choice(lexicon.PARTS), rng.choice(lexicon.COUNTS)
    who, sees = rng.choice(lexicon.PEOPLE), rng.choice(lexicon.SEEING)
    question = (
        f"{who} {sees} {count} {thing.many}. How many {thing.part} do {count} {thing.many} have?"
    )
    return question, str(count * thing.number)


def draw_sum(rng: random.Random) -> tuple[int, int, int]:
    """Draw two numbers and their sum."""
    first, second = rng.choice(lexicon.SUM_FIRST), rng.choice(lexicon.SUM_SECOND)
    return first, second, first + second


def draw_difference(rng: random.Random) -> tuple[int, int, int]:
    """Draw two numbers, the greater one first, and their difference."""
    second, rest = rng.choice(lexicon.SUM_SECOND), rng.choice(lexicon.SUM_FIRST)
    return second + rest, second, rest


def draw_story(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw a story in which somebody's things become more or fewer, and the new number."""
    who, thing = rng.choice(lexicon.PEOPLE), rng.choice(lexicon.OBJECTS)
    if rng.random() < 0.5:
        first, second, result = draw_sum(rng)
        change = f"{rng.choice(lexicon.GAINS)} {second} more"
    else:
        first, second, result = draw_difference(rng)
        change = f"{rng.choice(lexicon.LOSSES)} {second}"
    question = f"{who} has {first} {thing}. {who} {change}. How many {thing} does {who} have now?"
    return question, str(result)


PARTS = Miniature(
    name="NumGLUE-cm",
    metric="accuracy",
    language="en",
    max_answer_tokens=4,
    draw=draw_parts,
    frame=_FRAME,
)
STORIES = Miniature(
    name="NumGLUE-ds",
    metric="accuracy",
    language="en",
    max_answer_tokens=4,
    draw=draw_story,
    frame=_FRAME,
)
