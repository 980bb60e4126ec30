"""Every reading against examples worked out by hand or a second, slower computation."""

from __future__ import annotations

import random
import re
import statistics
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.tasks.metrics import (
    constant_score,
    edit_similarity,
    normalized,
    prefix,
    rouge_l,
    score,
    score_rows,
    strict,
    token_f1,
    unmask_literals,
)
from treelora_cli.tasks.sari import sari, source_text
from treelora_cli.tasks.text import mteval_words, words
from treelora_cli.tasks.types import Row, Task


def task_of(metric: str, train: list[str], test: list[str], reading: str = "whole") -> Task:
    splits = {
        "train": tuple(Row("p", answer) for answer in train),
        "test": tuple(Row("p", answer) for answer in test),
    }
    return Task("T", metric, "en", 16, splits, "f", reading=reading)


@pytest.mark.parametrize(
    ("prediction", "answer", "is_strict", "is_prefix", "is_normalized"),
    [
        ("A", "A", 1, 1, 1),
        (" A\n", "A", 1, 1, 1),
        ("a", "A", 0, 0, 1),
        ("A.", "A", 0, 1, 1),
        ("Actually", "A", 0, 1, 0),
        ("123", "12", 0, 1, 0),
        ("12", "123", 0, 0, 0),
        ("", "A", 0, 0, 0),
        ("very  Negative!", "very negative", 0, 0, 1),
        ("negative", "very negative", 0, 0, 0),
        ("12.5", "125", 0, 0, 1),
        ("支持", "支持", 1, 1, 1),
    ],
)
def test_accuracy_readings(prediction, answer, is_strict, is_prefix, is_normalized) -> None:
    row = Row("p", answer)
    assert strict(prediction, row) == is_strict
    assert prefix(prediction, row) == is_prefix
    assert normalized(prediction, row) == is_normalized


def test_first_letter_reading() -> None:
    task = task_of("accuracy", ["B\nbecause"], ["B\nbecause", "C\nso", "A\nso"], "first_letter")
    rows = task.splits["test"]
    found = score(task, ["B", "\n C other reasons", "c"], rows)
    assert found["score"] == found["strict"] == pytest.approx(2 / 3)
    # The official code takes the first character before it strips.
    assert found["prefix"] == pytest.approx(1 / 3)
    assert score(task, ["", "", "a"], rows)["normalized"] == pytest.approx(1 / 3)
    assert score(task, ["", "", ""], rows)["score"] == 0


def test_score_gives_the_tasks_own_metric_and_every_reading() -> None:
    task = task_of("accuracy", ["A"], ["A", "B"])
    assert score(task, ["A", "B."], task.splits["test"]) == {
        "score": 0.5,
        "strict": 0.5,
        "prefix": 1.0,
        "normalized": 1.0,
    }
    text = task_of("sari", ["x"], ["the cat"])
    found = score(text, ["the cat"], text.splits["test"])
    assert set(found) == {
        "score",
        "rouge_l",
        "edit_similarity",
        "f1",
        "sari",
        "sari_official",
    }
    assert found["score"] == found["sari"]
    assert score_rows(task, ["A", "A"], task.splits["test"]) == [1.0, 0.0]


def test_score_refuses_what_cannot_be_scored() -> None:
    task = task_of("accuracy", ["A"], ["A", "B"])
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        score(task, ["A"], task.splits["test"])
    with pytest.raises(ValueError, match="0 predictions for 0 rows"):
        score(task, [], [])
    with pytest.raises(ValueError, match="unknown metric 'bleu'"):
        score(task_of("bleu", ["a"], ["a"]), ["a"], [Row("p", "a")])


def test_constant_score_is_the_commonest_training_answer() -> None:
    task = task_of("accuracy", ["A", "B", "B", "C"], ["B", "B", "A", "C"])
    assert constant_score(task, "test") == 0.5
    tie = task_of("accuracy", ["B", "A"], ["A", "A", "B"])
    assert constant_score(tie, "test") == pytest.approx(2 / 3)
    letters = task_of("accuracy", ["A\nx", "A\ny", "B\nz"], ["A\nq", "B\nq"], "first_letter")
    assert constant_score(letters, "test") == 0.5
    assert constant_score(task_of("rouge_l", ["a"], ["a"]), "test") is None
    assert constant_score(task, "eval") is None


# --- words ---------------------------------------------------------------------------------


@given(st.text(st.characters(max_codepoint=127)))
def test_words_are_rouge_scores_own_on_ascii(text: str) -> None:
    from rouge_score import tokenize

    assert words(text) == tokenize.tokenize(text, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Führerausweis abgeben!", ["führerausweis", "abgeben"]),
        ("Fu\u0308hrerausweis", ["führerausweis"]),
        ("我爱NBA 2000年", ["我", "爱", "nba", "2000", "年"]),
        ("x_1 = foo(бар)", ["x", "1", "foo", "бар"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("，。！", []),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said: "No."', ["he", "said", ":", '"', "no", ".", '"']),
        ("1,000.5 km, ok.", ["1,000.5", "km", ",", "ok", "."]),
        ("10-20 %", ["10", "-", "20", "%"]),
        ("don't e-mail &amp; co", ["don't", "e-mail", "&", "co"]),
        ("Straße\nnass", ["straße", "nass"]),
        ("我爱 NBA", ["我", "爱", "nba"]),
    ],
)
def test_mteval_words(text: str, expected: list[str]) -> None:
    assert mteval_words(text) == expected


# --- ROUGE-L -------------------------------------------------------------------------------


def slow_rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence by plain recursion."""
    given_words, wanted = re.findall(r"\w+", prediction), re.findall(r"\w+", answer)

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(given_words) or j == len(wanted):
            return 0
        if given_words[i] == wanted[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    common = longest(0, 0)
    if not common:
        return 0.0
    precision, recall = common / len(given_words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_rouge_l_against_recursion() -> None:
    chance = random.Random(0)
    for letters in ("abcd", "äöüß", "αβγ"):
        for _ in range(60):
            texts = [" ".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(2)]
            assert rouge_l(texts[0], Row("p", texts[1])) == pytest.approx(slow_rouge_l(*texts))


def test_rouge_l_by_hand() -> None:
    # Common subsequence "the cat the mat": 4 of 5 words given, 4 of 6 wanted.
    row = Row("p", "The cat sat on the mat.")
    assert rouge_l("the cat, under the mat", row) == pytest.approx(
        2 * 0.8 * (4 / 6) / (0.8 + 4 / 6)
    )
    assert rouge_l("", row) == 0
    # Two of three characters in order; rouge-score's own tokenizer would see nothing here.
    assert rouge_l("我爱猫", Row("p", "我爱狗")) == pytest.approx(2 / 3)
    assert rouge_l(")", Row("p", ") ")) == 1
    assert rouge_l("(", Row("p", ") ")) == 0


def test_token_f1_by_hand() -> None:
    # Shared with repetition: a, a, b = 3; 4 words given, 5 wanted.
    assert token_f1("a a b c", Row("p", "b a a a d")) == pytest.approx(2 * 3 / 9)
    assert token_f1("", Row("p", "x")) == 0
    assert token_f1("y", Row("p", "x")) == 0
    assert token_f1("...", Row("p", "...")) == 1


# --- edit similarity -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = <NUM_LIT>", "x = 0"),
        ("f ( '<STR_LIT>' , <NUM_LIT:200> )", "f ( '' , 200 )"),
        ("c = '<CHAR_LIT>' + '<STR_LIT:a b>'", "c = '' + 'a b'"),
        ("'<STR_LIT:>' <STR> <EOL>", "'' <STR> <EOL>"),
    ],
)
def test_literals_are_put_back(code: str, expected: str) -> None:
    assert unmask_literals(code) == expected


def slow_similarity(left: str, right: str) -> float:
    """1 - (insertions + deletions) / lengths by the textbook table."""
    table = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        above, table[0] = table[0], i
        for j, b in enumerate(right, start=1):
            cost = above if a == b else 1 + min(table[j], table[j - 1])
            above, table[j] = table[j], cost
    return 1 - table[-1] / (len(left) + len(right))


@given(st.text("ab ()=", min_size=1), st.text("ab ()=", min_size=1))
def test_edit_similarity_against_the_table(left: str, right: str) -> None:
    given_code, wanted = left.strip(), right.strip()
    if not given_code or not wanted:
        return
    expected = slow_similarity(given_code, wanted)
    assert edit_similarity(left, Row("p", right)) == pytest.approx(expected)


def test_edit_similarity_of_code() -> None:
    row = Row("p", "x = <NUM_LIT:10> ")
    assert edit_similarity("x = 10", row) == 1
    # "x = 1" against "x = 10": one insertion in 11 characters.
    assert edit_similarity("x = <NUM_LIT:1>", row) == pytest.approx(1 - 1 / 11)
    assert edit_similarity("", row) == 0


# --- SARI ----------------------------------------------------------------------------------

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        # Documented by the Hugging Face metric "sari".
        ("About 95 you now get in .", 0.26953601953601954),
        # Tested by Tensor2Tensor's sari_hook, after the paper's examples.
        ("About 95 species are now agreed .", 0.6170966),
        ("About 95 species are currently agreed .", 0.5088682),
    ],
)
def test_sari_gives_the_published_values(output: str, expected: float) -> None:
    assert sari(SOURCE, output, REFERENCES) == pytest.approx(expected, abs=1e-7)
    assert sari(SOURCE, output, REFERENCES, undefined=1.0) == pytest.approx(expected, abs=1e-7)


def slow_sari(source: str, output: str, reference: str, undefined: float) -> float:
    """SARI with one reference, counting every n-gram by searching the word lists."""

    def grams(text: str, size: int) -> list[str]:
        parts = text.split()
        return [
            " ".join(parts[at : at + size]) for at in range(len(parts)) if at + size <= len(parts)
        ]

    def share(part: float, whole: float) -> float:
        return part / whole if whole else undefined

    def f1(p: float, r: float) -> float:
        return statistics.harmonic_mean([p, r]) if p and r else 0.0

    parts = []
    for size in (1, 2, 3, 4):
        s, o, r = (grams(text, size) for text in (source, output, reference))
        new = {g for g in o if g not in s}
        asked = {g for g in r if g not in s}
        add = f1(share(len(new & asked), len(new)), share(len(new & asked), len(asked)))
        kept = {g: min(s.count(g), o.count(g)) for g in s if g in o}
        hits = {g: min(n, r.count(g)) for g, n in kept.items()}
        wanted = sum(min(s.count(g), r.count(g)) for g in set(s))
        keep = f1(
            share(sum(hits[g] / kept[g] for g in kept), len(kept)),
            share(sum(hits.values()), wanted),
        )
        gone = {g: s.count(g) - o.count(g) for g in s if s.count(g) > o.count(g)}
        right = {g: min(n, max(n - r.count(g), 0)) for g, n in gone.items()}
        drop = share(sum(right[g] / gone[g] for g in gone), len(gone))
        parts.append((add + keep + drop) / 3)
    return sum(parts) / 4


@pytest.mark.parametrize("undefined", [0.0, 1.0])
def test_sari_against_a_second_computation(undefined: float) -> None:
    chance = random.Random(1)
    for _ in range(300):
        texts = [" ".join(chance.choices("abcdef", k=chance.randint(0, 8))) for _ in range(3)]
        found = sari(texts[0], texts[1], [texts[2]], undefined=undefined)
        assert found == pytest.approx(slow_sari(*texts, undefined)), texts


def test_sari_by_hand() -> None:
    # One word each: source a, output b, reference b. Unigrams: added b (1), nothing to keep (0/0),
    # a deleted rightly (1). Longer n-grams do not exist: every part is 0/0.
    assert sari("a", "b", ["b"]) == pytest.approx((1 + 0 + 1) / 3 / 4)
    assert sari("a", "b", ["b"], undefined=1.0) == 1
    # Copying the source adds nothing and deletes nothing; half of what it keeps was wanted.
    assert sari("a b", "a b", ["a"]) == pytest.approx((2 * 0.5 * 1 / 1.5) / 3 / 4)


def test_sari_task_takes_the_paragraph_as_source() -> None:
    prompt = (
        "Provide a simplified version.\n\nParagraph:\nDer Hund bellt sehr laut.\n\nSimplification:"
    )
    row = Row(prompt, "Der Hund bellt laut.")
    task = Task("20Minuten", "sari", "de", 9, {"test": (row,)}, "f")
    found = score(task, ["Der Hund bellt."], [row])
    paragraph = "Der Hund bellt sehr laut."
    assert found["sari"] == sari(paragraph, "Der Hund bellt.", [row.answer])
    assert found["sari_official"] == sari(prompt, "Der Hund bellt.", [row.answer], undefined=1.0)
    assert found["sari"] != found["sari_official"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Do this.\n\nParagraph:\nEin Text.\nZwei: ja.\n\nSimplification:", "Ein Text.\nZwei: ja."),
        ("Vereinfache:\nEin Text.", "Ein Text."),
        ("Ein Text ohne alles.", "Ein Text ohne alles."),
        ("1\n2\n3\n4\nspät:\nText", "1\n2\n3\n4\nspät:\nText"),
        ("Nur:", "Nur:"),
        ("文本：\n你好。\n简化：", "你好。"),
        ("Make it simple.\nParagraph: Ein Text.\nAchtung: ja.\nAnswer:", "Ein Text.\nAchtung: ja."),
        ("Ein Text.\nAchtung: ja.", "Ein Text.\nAchtung: ja."),
    ],
)
def test_source_text(prompt: str, expected: str) -> None:
    assert source_text(prompt) == expected


WORDS = st.lists(st.sampled_from(["a", "b", "c", "Ü", "我", ".", "1"])).map(" ".join)


@given(WORDS, WORDS.filter(str.strip), WORDS.filter(str.strip))
def test_everything_is_between_zero_and_one(prediction: str, answer: str, prompt: str) -> None:
    row = Row(prompt, answer)
    for metric in ("accuracy", "sari"):
        task = Task("T", metric, "en", 9, {"test": (row,)}, "f")
        for value in score(task, [prediction], [row]).values():
            assert 0 <= value <= 1 + 1e-12
