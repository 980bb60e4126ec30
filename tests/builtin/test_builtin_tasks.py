"""The miniature tasks: repeatable rows, splits apart, balanced labels, true answers."""

import re
import time
from collections import Counter

import pytest

from treelora_cli.errors import UsageError
from treelora_cli.tasks import miniature
from treelora_cli.tasks.miniature import lexicon

TRACE_ORDER = (
    "C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds",
    "20Minuten",
)  # fmt: skip
CHOICES = ("C-STANCE", "FOMC", "ScienceQA")


def all_rows(task):
    return [row for split in task.splits.values() for row in split]


def test_names_are_the_eight_in_trace_order():
    assert miniature.NAMES == TRACE_ORDER


@pytest.mark.parametrize("name", miniature.NAMES)
def test_default_rows_no_text_twice_and_quick(name):
    started = time.process_time()
    task = miniature.load(name)
    assert time.process_time() - started < 0.3
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 300, "eval": 50, "test": 100,
    }  # fmt: skip
    prompts = [row.prompt for row in all_rows(task)]
    assert len(set(prompts)) == len(prompts)
    assert task.synthetic
    assert task.source == f"built-in, synthetic, seed {miniature.DEFAULT_SEED}"


@pytest.mark.parametrize("name", miniature.NAMES)
def test_same_seed_same_rows_other_seed_other_rows(name):
    first, again, other = miniature.load(name), miniature.load(name), miniature.load(name, seed=1)
    assert first == again
    assert first.fingerprint != other.fingerprint
    assert first.splits["test"] != other.splits["test"]


def test_fingerprints_are_pinned():
    """A change of any row is a new data set: it must be meant, and the base made again."""
    assert {name: miniature.load(name).fingerprint[:12] for name in miniature.NAMES} == PINNED


PINNED = {
    "C-STANCE": "18eabafd22fb",
    "FOMC": "397ab8db9e00",
    "MeetingBank": "244e05480262",
    "Py150": "8cce38b7db6b",
    "ScienceQA": "9ffea55ee62d",
    "NumGLUE-cm": "f64ece2e74ee",
    "NumGLUE-ds": "c6559d9155d3",
    "20Minuten": "9bbdf3e7d2bd",
}


@pytest.mark.parametrize("name", miniature.NAMES)
def test_a_longer_split_starts_with_the_shorter_one(name):
    short = miniature.load(name, {"train": 20, "eval": 0, "test": 10})
    full = miniature.load(name)
    assert short.splits["train"] == full.splits["train"][:20]
    assert short.splits["test"] == full.splits["test"][:10]
    assert short.splits["eval"] == ()


@pytest.mark.parametrize("name", CHOICES)
def test_labels_are_balanced(name):
    task = miniature.load(name)
    assert task.labels == ("A", "B", "C")
    for rows in task.splits.values():
        counts = Counter(row.answer for row in rows)
        assert set(counts) == {"A", "B", "C"}
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", ["NumGLUE-cm", "NumGLUE-ds"])
def test_no_number_is_asked_for_often(name):
    answers = Counter(row.answer for row in miniature.load(name).splits["train"])
    assert max(answers.values()) < 0.2 * 300


def test_products_are_right():
    parts = {(thing.many, thing.part): thing.number for thing in lexicon.PARTS}
    for row in all_rows(miniature.load("NumGLUE-cm")):
        part, count, many = re.search(r"How many (\w+) do (\d+) (\w+) have\?", row.prompt).groups()
        assert int(row.answer) == sum(parts[many, part] for _ in range(int(count)))


def test_sums_are_right():
    for row in all_rows(miniature.load("NumGLUE-ds")):
        has, change = re.search(r"has (\d+) .*?\. \w+ (.*?)\. How", row.prompt).groups()
        amount = int(re.search(r"\d+", change).group())
        grows = change.split()[0] in lexicon.GAINS
        assert grows == change.endswith("more")
        assert int(row.answer) == (int(has) + amount if grows else int(has) - amount) >= 0


def test_science_groups_are_apart_and_held_out_words_stay_held_out():
    words = [word for group in lexicon.SCIENCE_GROUPS.values() for word in group]
    assert len(set(words)) == len(words)
    group_of = {
        word: letter
        for letter, group in zip("ABC", lexicon.SCIENCE_GROUPS.values(), strict=True)
        for word in group
    }
    task = miniature.load("ScienceQA")
    seen: dict[str, set[str]] = {}
    for split, rows in task.splits.items():
        for row in rows:
            question = row.prompt.split("Question:")[1]
            named = [word for word in re.findall(r"\w+", question) if word in group_of]
            assert len(named) == 2
            assert {group_of[word] for word in named} == {row.answer}
            seen.setdefault(split, set()).update(named)
    assert not seen["train"] & (seen["eval"] | seen["test"])


def test_stances_and_tones_follow_their_clauses():
    stances = dict(zip("ABC", lexicon.STANCE_CLAUSES.values(), strict=True))
    for row in all_rows(miniature.load("C-STANCE")):
        target = re.search("对象：(.*)\n", row.prompt).group(1)
        judged = row.prompt.split(target)[-1]
        assert sum(clause in judged for clause in stances[row.answer]) == 2
    tones = dict(zip("ABC", lexicon.POLICY_CLAUSES.values(), strict=True))
    for row in all_rows(miniature.load("FOMC")):
        assert sum(clause in row.prompt for clause in tones[row.answer]) == 2


def test_summaries_say_what_happened():
    for row in all_rows(miniature.load("MeetingBank")):
        ayes, noes = map(int, re.search(r"(\d+) ayes, (\d+) noes", row.prompt).groups())
        assert ("approved" if ayes > noes else "rejected") in row.answer
        assert ("passes" if ayes > noes else "fails") in row.prompt
        assert row.answer.endswith(f"{ayes} to {noes}.")
        mover, topic = re.search(r"moved by (\w+)|$", row.answer), row.answer.split(",")[0]
        assert f"{mover.group(1)} moves it" in row.prompt
        assert topic.removeprefix("The ") in row.prompt


def test_easy_german_has_no_hard_word_and_keeps_the_second_sentence():
    pairs = (
        *lexicon.GERMAN_SUBJECTS, *lexicon.GERMAN_VERBS, *lexicon.GERMAN_TIMES,
        *lexicon.GERMAN_OBJECTS,
    )  # fmt: skip
    assert len({hard for hard, _ in pairs}) == len({easy for _, easy in pairs}) == len(pairs)
    for row in all_rows(miniature.load("20Minuten")):
        hard = [pair for pair in pairs if pair[0] in row.prompt]
        assert len(hard) == 4
        assert all(easy in row.answer and word not in row.answer for word, easy in hard)
        second = row.answer.split(". ", 1)[1]
        assert second in row.prompt


def test_prompts_name_no_task():
    for name in miniature.NAMES:
        for row in all_rows(miniature.load(name)):
            assert name.lower() not in row.prompt.lower()
            assert row.prompt.endswith("<EOL>" if name == "Py150" else "\nAnswer:")


@pytest.mark.parametrize(
    ("name", "rows", "what"),
    [
        ("FOMCC", None, "FOMC"),
        ("FOMC", {"dev": 3}, "splits are"),
        ("FOMC", {"train": -1}, "0 or more"),
        ("ScienceQA", {"test": 100_000}, "fewer rows"),
    ],
)
def test_wrong_use_is_explained(name, rows, what):
    with pytest.raises(UsageError) as caught:
        miniature.load(name, rows)
    assert what in caught.value.hint
