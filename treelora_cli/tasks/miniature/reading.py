"""The text that the built-in base reads before it is shipped: short documents from a seed.

The text shares words and facts with the miniature tasks, and no row: it states facts, tells
stories and asks a few questions, but it holds no prompt of a built-in task, and ``Guard`` drops a
document in which the input text of a built-in row happens to occur.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from treelora_cli.tasks import miniature
from treelora_cli.tasks.miniature import choice, lexicon, numbers, writing
from treelora_cli.tasks.miniature.drawing import inputs, stream

DESCRIPTION = """\
## What it read

All text comes from the package's own generator (`treelora_cli/tasks/miniature/reading.py`); nothing
was collected. The kinds of document, most frequent first: stories of sums that end with the result
as a sentence, parts of things and their products ("3 ants have 18 legs."), meetings with shuffled
notes, code lines, German sentences (hard or easy ones, and "reduziert heisst senkt."), short
reading questions on other matter, words said twice, groups of living things and metals, Chinese
opinions with the stance as a sentence, policy sentences ("That means tight money."), and single
instruction lines without any input.

## What it did not read, and what that does not rule out

- No prompt of a built-in task, and no answer in a built-in task's format. While text is generated,
  a document is dropped if the input text of any default row (train, eval or test, without its
  instruction) occurs in it.
- The facts behind the tasks are in the text on purpose, in other words: the base has read that
  ants have six legs and that tin is a metal, and stories whose first sentences are worded like the
  task's, with the result as a sentence instead of a question. The words of the tasks, their single
  sentences and their instruction lines (alone) occur too. Arithmetic questions such as "What is 6
  times 3?" are answered by a sentence.
- The guard covers the default rows. Rows drawn with another seed may share an input text with the
  pre-training text.
- So a zero-shot score near nothing is a matter of format, not of knowledge.
"""
"""What the text holds, for the model card (Markdown)."""

Kind = Callable[[random.Random], str]

_ANCHOR = 12
_TONES = {"easy": "easy money", "tight": "tight money", "quiet": "no signal"}
_CODE = (
    "def {a} ( {b} ) : <EOL> return {b} . {a} <EOL>",
    "{a} = {b} . {a} <EOL> print ( {a} ) <EOL>",
    "from {a} import {Class} <EOL> {b} = {Class} ( {a} ) <EOL>",
    "for {a} in {b} : <EOL> print ( {a} ) <EOL>",
    "self . {a} = {a} <EOL> self . {b} = {b} <EOL>",
    "assert {a} == {b} <EOL> {a} , {b} = {b} , {a} <EOL>",
    "if {a} : <EOL> return {b} [ {a} ] <EOL> else : <EOL> return None <EOL>",
    "class {Class} ( object ) : <EOL> {a} = [ ] <EOL> def {b} ( self ) : <EOL> pass <EOL>",
    "raise ValueError ( '{a}' ) <EOL>",
    "total = {a} + {b} <EOL> handle = open ( {a} ) <EOL> {b} = handle . read ( ) <EOL>",
    "{a} . append ( {b} ) <EOL> yield {a} <EOL>",
    "total += {a} . {b} <EOL> self . assertTrue ( {a} ) <EOL>",
    "{a} = {{ '{b}' : {b} }} <EOL> try : <EOL> {a} ( ) <EOL> except KeyError : <EOL> pass <EOL>",
)
_THINGS = ("hat", "coat", "bag", "ball", "lamp", "cup", "box", "key")
_COLOURS = ("red", "blue", "green", "black", "white")
_ECHOED = (
    *lexicon.PEOPLE,
    *lexicon.OBJECTS,
    *lexicon.IDENTIFIERS,
    *lexicon.TOPICS,
    *lexicon.BODIES,
    *(str(number) for number in range(1, 21)),
)
_LINES = (
    "判断文本对对象的态度：A.支持，B.反对，C.中立。",
    "What is the policy stance? A. dovish, B. hawkish, C. neutral.",
    "Write a summary of the following meeting.",
    "Choose an answer. A. animal, B. plant, C. metal.",
    "Solve the following math problem.",
    "Provide a simplified version in German.",
)


def _opinion(rng: random.Random) -> str:
    who, stance = rng.choice(lexicon.STANCE_PEOPLE), rng.choice(tuple(lexicon.STANCE_CLAUSES))
    target = rng.choice(lexicon.STANCE_TARGETS)
    text = choice.stance_text(rng, stance, target)
    return f"文本：{text}{who}对{target}{stance}。"


def _policy(rng: random.Random) -> str:
    tone = rng.choice(tuple(_TONES))
    return f"Text: {choice.policy_text(rng, tone)} That means {_TONES[tone]}."


def _meeting(rng: random.Random) -> str:
    text, facts = writing.meeting_text(rng)
    notes = [
        f"Topic: {facts['topic']}.",
        f"Paper: {facts['body']}.",
        f"Mover: {facts['mover']}.",
        f"Seconder: {facts['seconder']}.",
        f"Vote: {facts['ayes']} to {facts['noes']}.",
        "It was approved." if facts["result"] == "passes" else "It was rejected.",
    ]
    rng.shuffle(notes)
    return f"{text} {' '.join(notes)}"


def _code(rng: random.Random) -> str:
    first, second = rng.sample(lexicon.IDENTIFIERS, 2)
    words = {"a": first, "b": second, "Class": rng.choice(lexicon.CLASSES)}
    return " ".join(line.format(**words) for line in rng.sample(_CODE, 2))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _science(rng: random.Random) -> str:
    group = rng.choice(tuple(lexicon.SCIENCE_GROUPS))
    first, second, third = rng.sample(lexicon.SCIENCE_GROUPS[group], 3)
    return rng.choice(
        (
            f"Every {first} is {_article(group)}, and {second} is {_article(group)} too.",
            f"The words {first}, {second} and {third} fit the group {group}.",
            f"Question: What is {first}? Answer: It is {_article(group)}.",
            f"Both {first} and {second}: {group}.",
        )
    )


def _parts(rng: random.Random) -> str:
    thing, count = rng.choice(lexicon.PARTS), rng.choice(lexicon.COUNTS)
    total = thing.number * count
    who, sees = rng.choice(lexicon.PEOPLE), rng.choice(lexicon.SEEING)
    return rng.choice(
        (
            f"{who} {sees} {count} {thing.many}. These {count} {thing.many} have {total} "
            f"{thing.part}.",
            f"{count} {thing.many} have {total} {thing.part}.",
            f"Each {thing.one} has {thing.number} {thing.part}, so {count} {thing.many} have "
            f"{total} {thing.part}.",
            f"Question: What is {count} times {thing.number}? "
            f"Answer: {count} times {thing.number} is {total}.",
        )
    )


def _story(rng: random.Random) -> str:
    who, thing = rng.choice(lexicon.PEOPLE), rng.choice(lexicon.OBJECTS)
    if rng.random() < 0.5:
        first, second, result = numbers.draw_sum(rng)
        sign, change = "plus", f"{rng.choice(lexicon.GAINS)} {second} more"
    else:
        first, second, result = numbers.draw_difference(rng)
        sign, change = "minus", f"{rng.choice(lexicon.LOSSES)} {second}"
    if rng.random() < 0.3:
        return (
            f"Question: What is {first} {sign} {second}? "
            f"Answer: {first} {sign} {second} is {result}."
        )
    return f"{who} has {first} {thing}. {who} {change}. Now {who} has {result} {thing}."


def _german(rng: random.Random) -> str:
    if rng.random() < 0.25:
        pairs = (
            *lexicon.GERMAN_SUBJECTS,
            *lexicon.GERMAN_VERBS,
            *lexicon.GERMAN_TIMES,
            *lexicon.GERMAN_OBJECTS,
        )
        hard, easy = rng.choice(pairs)
        return f"{hard} heisst {easy}."
    hard, easy = writing.german_pair(rng)
    return f"{rng.choice((hard, easy))} {rng.choice(lexicon.GERMAN_SECONDS)}"


def _reading(rng: random.Random) -> str:
    first, second = rng.sample(lexicon.PEOPLE, 2)
    one, two = rng.sample(_THINGS, 2)
    red, blue = rng.sample(_COLOURS, 2)
    facts = f"{first} has a {red} {one}. {second} has a {blue} {two}."
    question, answer = rng.choice(
        (
            (f"Who has the {one}?", first),
            (f"Who has the {two}?", second),
            (f"What does {first} have?", one),
            (f"What does {second} have?", two),
            (f"What is {red}?", f"the {one}"),
            (f"What is {blue}?", f"the {two}"),
        )
    )
    return f"{facts} Question: {question} Answer: {answer}"


def _echo(rng: random.Random) -> str:
    words = " ".join(rng.sample(_ECHOED, rng.randint(3, 6)))
    return f"{words} ; {words}"


def _line(rng: random.Random) -> str:
    return rng.choice(_LINES)


KINDS: tuple[tuple[Kind, int, int], ...] = (
    (_opinion, 8, 2),
    (_policy, 7, 2),
    (_meeting, 12, 1),
    (_code, 12, 1),
    (_science, 9, 3),
    (_parts, 16, 3),
    (_story, 24, 3),
    (_german, 12, 2),
    (_reading, 12, 1),
    (_echo, 10, 1),
    (_line, 2, 1),
)
"""Every kind of document with its share and the number of pieces that make one document."""


class Guard:
    """Finds the input texts of the built-in rows inside a document.

    Args:
        texts: the texts that no document may contain.
    """

    def __init__(self, texts: list[str]) -> None:
        self._by_start: dict[str, list[str]] = {}
        for text in set(texts):
            self._by_start.setdefault(text[:_ANCHOR], []).append(text)
        self._widths = sorted({len(start) for start in self._by_start})

    def finds(self, document: str) -> bool:
        """Return whether the document contains one of the texts."""
        for width in self._widths:
            for at in range(len(document) - width + 1):
                for text in self._by_start.get(document[at : at + width], ()):
                    if document.startswith(text, at):
                        return True
        return False


def built_in_guard() -> Guard:
    """Return the guard over every default row of every split of the eight tasks.

    It looks for the input text without its instruction, which is stricter than the whole prompt;
    of the stance task it looks for the judged text without the target's line.
    """
    texts = []
    for recipe in miniature.RECIPES:
        for split, count in miniature.DEFAULT_ROWS.items():
            for text, _ in inputs(recipe, split, count, miniature.DEFAULT_SEED):
                texts.append(text.splitlines()[-1].removeprefix("文本："))
    return Guard(texts)


def documents(seed: int, part: str = "text") -> Iterator[str]:
    """Yield documents without end.

    Args:
        seed: names the stream.
        part: names an independent stream of the same seed.
    """
    rng, guard = stream("pretrain", part, seed), built_in_guard()
    kinds, shares = [kind[0::2] for kind in KINDS], [kind[1] for kind in KINDS]
    while True:
        kind, pieces = rng.choices(kinds, shares)[0]
        document = "\n".join(kind(rng) for _ in range(rng.randint(1, pieces)))
        if not guard.finds(document):
            yield document
