"""Miniature writing tasks: meeting summaries, the next line of code, simpler German."""

from __future__ import annotations

import random

from treelora_cli.tasks.miniature import lexicon
from treelora_cli.tasks.miniature.drawing import Miniature

_CODE = (
    (
        "class {Class} ( object ) : <EOL> def __init__ ( self , {a} , {b} ) : <EOL> "
        "self . {a} = {a} <EOL>",
        "self . _{b} = {b}",
    ),
    ("class {Class} ( object ) : <EOL> def get_{a} ( self ) : <EOL>", "return self . _{a}"),
    ("total = 0 <EOL> for {a} in {b} . {a}s : <EOL>", "total += {a}"),
    ("with open ( {a}_{b} ) as handle : <EOL>", "{a} = handle . read ( )"),
    (
        "def check_{a} ( {a} , {b} ) : <EOL> if {a} is None : <EOL>",
        "raise ValueError ( '{a}' )",
    ),
    ("try : <EOL> {a} = {b} [ '{a}' ] <EOL> except KeyError : <EOL>", "{a} = None"),
    ("def test_{a} ( self ) : <EOL> {b} = {Class} ( ) <EOL>", "self . assertTrue ( {b} . {a} )"),
    ("if not {a} : <EOL> {a} = [ ] <EOL> for {b} in {a} : <EOL>", "yield {b}"),
)


def german_pair(rng: random.Random) -> tuple[str, str]:
    """Return a hard German sentence and its easy form."""
    parts = [
        rng.choice(pairs)
        for pairs in (
            lexicon.GERMAN_SUBJECTS,
            lexicon.GERMAN_VERBS,
            lexicon.GERMAN_TIMES,
            lexicon.GERMAN_OBJECTS,
        )
    ]
    hard, easy = (" ".join(part[side] for part in parts) + "." for side in (0, 1))
    return hard, easy


def meeting_text(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Return what was said about one item of a meeting, and its facts."""
    mover, seconder = rng.sample(lexicon.PEOPLE, 2)
    ayes = rng.randint(2, 9)
    noes = rng.choice([n for n in range(1, 10) if n != ayes])
    facts = {
        "topic": rng.choice(lexicon.TOPICS),
        "body": rng.choice(lexicon.BODIES),
        "mover": mover,
        "seconder": seconder,
        "result": "passes" if ayes > noes else "fails",
        "ayes": str(ayes),
        "noes": str(noes),
    }
    text = (
        f"{rng.choice(lexicon.REMARKS)} Next is the {facts['body']} on {facts['topic']}. "
        f"{mover} moves it, {seconder} seconds. {ayes} ayes, {noes} noes. It {facts['result']}."
    )
    return text, facts


def draw_meeting(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw the talk about one item and a summary of it."""
    text, facts = meeting_text(rng)
    verdict = "approved" if facts["result"] == "passes" else "rejected"
    summary = (
        f"The {facts['body']} on {facts['topic']}, moved by {facts['mover']}, was {verdict} "
        f"{facts['ayes']} to {facts['noes']}."
    )
    return text, summary


def draw_code(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw some lines of code, in TRACE's spaced form, and the next line."""
    before, after = rng.choice(_CODE)
    first, second = rng.sample(lexicon.IDENTIFIERS, 2)
    words = {"a": first, "b": second, "Class": rng.choice(lexicon.CLASSES)}
    prefix = f"import {rng.choice(lexicon.IDENTIFIERS)} <EOL> "
    return prefix + before.format(**words), after.format(**words)


def draw_german(rng: random.Random, _split: str) -> tuple[str, str]:
    """Draw a hard and an easy sentence with the same, already easy, second sentence."""
    hard, easy = german_pair(rng)
    second = rng.choice(lexicon.GERMAN_SECONDS)
    return f"{hard} {second}", f"{easy} {second}"


MEETING = Miniature(
    name="MeetingBank",
    metric="rouge_l",
    language="en",
    max_answer_tokens=36,
    draw=draw_meeting,
    frame="Write a summary of the following meeting.\nMeeting: {text}\nAnswer:",
)
CODE = Miniature(
    name="Py150",
    metric="edit_similarity",
    language="code",
    max_answer_tokens=24,
    draw=draw_code,
    frame="{text}",
)
GERMAN = Miniature(
    name="20Minuten",
    metric="sari",
    language="de",
    max_answer_tokens=40,
    draw=draw_german,
    frame="Provide a simplified version in German.\nParagraph: {text}\nAnswer:",
)
