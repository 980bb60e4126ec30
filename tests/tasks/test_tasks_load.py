"""Names, limits, fingerprints and what the catalog says of a task."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.errors import UsageError
from treelora_cli.tasks.catalog import KNOWN, guess, lookup, resolve
from treelora_cli.tasks.fingerprint import fingerprint
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import available, limit_rows, load_found, load_tasks
from treelora_cli.tasks.metrics import METRICS, constant_score
from treelora_cli.tasks.types import SPLITS, Row, Task


def task_of(answers: list[str], reading: str = "whole") -> Task:
    splits = {
        split: tuple(Row(f"{split} {at}", answer) for at, answer in enumerate(answers))
        for split in SPLITS
    }
    return Task("T", "accuracy", "en", 16, splits, "data", reading=reading, source="here")


def test_builtin_tasks_come_without_a_folder() -> None:
    names = available(None)
    assert names[:2] == ["C-STANCE", "FOMC"]
    (task,) = load_tasks([names[1]], None)
    assert task.synthetic
    with pytest.raises(UsageError, match="no built-in task 'FOMX'") as caught:
        load_tasks(["FOMX"], None)
    assert "'FOMC'" in caught.value.hint


# --- limits --------------------------------------------------------------------------------


def test_limit_keeps_the_shares_and_the_order() -> None:
    task = task_of(["A"] * 60 + ["B"] * 30 + ["C"] * 10)
    small = limit_rows(task, 20, 10, seed=1)
    assert Counter(row.answer for row in small.splits["train"]) == {"A": 12, "B": 6, "C": 2}
    assert Counter(row.answer for row in small.splits["test"]) == {"A": 6, "B": 3, "C": 1}
    places = [task.splits["train"].index(row) for row in small.splits["train"]]
    assert places == sorted(places)
    assert small.fingerprint == task.fingerprint
    assert small.source == "here (limited: train 20, eval 10, test 10)"


def test_limit_does_not_depend_on_the_order_of_the_file() -> None:
    task = task_of(["A", "B"] * 20)
    rows = list(task.splits["train"])
    random.Random(3).shuffle(rows)
    shuffled = dataclasses.replace(task, splits={**task.splits, "train": tuple(rows)})
    chosen = limit_rows(task, 8, None, seed=5).splits["train"]
    assert set(limit_rows(shuffled, 8, None, seed=5).splits["train"]) == set(chosen)
    assert set(limit_rows(task, 8, None, seed=6).splits["train"]) != set(chosen)


def test_limit_reads_first_letters_and_leaves_open_answers_alone() -> None:
    letters = task_of([f"{'AB'[at % 2]}\nreason {at}" for at in range(80)], "first_letter")
    taken = limit_rows(letters, 10, None, seed=1).splits["train"]
    assert Counter(row.answer[0] for row in taken) == {"A": 5, "B": 5}
    free = task_of([f"text {at}" for at in range(80)])
    assert len(limit_rows(free, 10, 3, seed=1).splits["eval"]) == 3


def test_nothing_to_limit_gives_the_same_task() -> None:
    task = task_of(["A", "B"])
    assert limit_rows(task, None, None, seed=1) is task
    assert limit_rows(task, 2, 99, seed=1) is task


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="limit of 0 rows"):
        limit_rows(task_of(["A"]), 0, None, seed=1)


@given(st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=60), st.integers(1, 70))
def test_limit_always_gives_that_many(answers: list[str], limit: int) -> None:
    task = task_of(answers)
    taken = limit_rows(task, limit, None, seed=0).splits["train"]
    assert len(taken) == min(limit, len(answers))
    for answer, count in Counter(row.answer for row in taken).items():
        share = limit * answers.count(answer) / len(answers)
        assert limit >= len(answers) or abs(count - share) < 1


# --- fingerprint ---------------------------------------------------------------------------


def test_fingerprint_tells_every_change_apart() -> None:
    def of(name="T", metric="f1", reading="whole", separator="", **splits: list[Row]) -> str:
        return fingerprint(name, metric, reading, splits, separator)

    a, b = Row("a", "b"), Row("ab", "c")
    different = [
        of(train=[a]),
        of(name="U", train=[a]),
        of(metric="sari", train=[a]),
        of(reading="first_letter", train=[a]),
        of(separator=" ", train=[a]),
        of(eval=[a]),
        of(train=[a, a]),
        of(train=[a], eval=[a]),
        of(train=[a, b]),
        of(train=[b, a]),
        of(train=[Row("", "ab")]),
        of(train=[Row("ab", "")]),
        of(train=[Row("a", "b1:c")]),
        of(train=[b]),
        of(train=[Row("a", "bc")]),
    ]
    assert len(set(different)) == len(different)
    assert of(train=[a]) == of(train=[Row("a", "b")], eval=[], test=[])


def test_fingerprint_is_the_same_for_ever() -> None:
    found = fingerprint("FOMC", "accuracy", "whole", {"train": [Row("für", "态")]}, " ")
    stream = "treelora task 1\n4:FOMC8:accuracy5:whole1: 5:train1;4:für3:态4:eval0;4:test0;"
    assert found == hashlib.sha256(stream.encode()).hexdigest()


# --- catalog -------------------------------------------------------------------------------


def test_catalog_knows_both_benchmarks() -> None:
    by_benchmark = Counter(info.benchmark for info in KNOWN.values())
    assert by_benchmark == {"TRACE": 9, "O-LoRA": 15}
    assert [name for name, info in KNOWN.items() if info.metric not in METRICS] == ["Lima"]
    assert len(KNOWN["yahoo"].labels or ()) == 10
    assert len(KNOWN["dbpedia"].labels or ()) == 14
    assert lookup("fomc") is KNOWN["FOMC"]
    assert lookup("mine") is None


def test_defaults_of_the_benchmark() -> None:
    assert len(KNOWN) == 24
    trace = {name: info.epochs for name, info in KNOWN.items() if info.benchmark == "TRACE"}
    assert trace == {
        "C-STANCE": 2,
        "FOMC": 1,
        "MeetingBank": 3,
        "Py150": 2,
        "ScienceQA": 1,
        "NumGLUE-cm": 2,
        "NumGLUE-ds": 2,
        "20Minuten": 3,
        "Lima": None,
    }
    for info in KNOWN.values():
        expected = ("", None) if info.benchmark == "TRACE" else (" ", 1)
        assert info.separator == expected[0]
        assert info.benchmark == "TRACE" or info.epochs == expected[1]
        assert info.max_answer_tokens >= 16


def test_lima_is_for_replay_only(trace, tmp_path) -> None:
    trace("Lima", answers=("A long answer.", "Another one."))
    for data in (None, tmp_path / "data"):
        for name in ("Lima", "lima"):
            with pytest.raises(UsageError, match=f"{name} is for replay only: it has no metric"):
                load_tasks([name], data)
    (loaded,) = load_found(detect(tmp_path / "data"), ["Lima"])
    assert loaded.task.metric == "none"
    assert constant_score(loaded.task, "test") is None


def test_known_tasks_keep_their_separator_in_plain_tables(tmp_path) -> None:
    for name, separator, answer in (
        ("FOMC", "", "A"),
        ("yahoo", " ", "Health"),
        ("mine", " ", "A"),
    ):
        rows = "".join(f'{{"prompt": "p{n}", "answer": "{answer}"}}\n' for n in range(9))
        (tmp_path / f"{name}.jsonl").write_text(rows)
        (task,) = load_tasks([name], tmp_path)
        assert task.separator == separator


def test_guesses_are_logged_for_those_who_train_directly(tmp_path, caplog) -> None:
    (tmp_path / "mine.csv").write_text(
        "question,answer\n" + "".join(f"q{n},{n}\n" for n in range(9))
    )
    with caplog.at_level("INFO", logger="treelora"):
        load_tasks(["mine"], tmp_path / "mine.csv")
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in ("accuracy guessed", "split by a hash", "one space put between"):
        assert words in said


@pytest.mark.parametrize(
    ("answers", "metric", "labels", "said"),
    [
        (["yes", "no"] * 5, "accuracy", ("no", "yes"), "2 distinct answers"),
        (["1", "0"] * 5, "accuracy", ("0", "1"), "2 distinct answers"),
        (["1", "-2.5", "3,000", "40%"], "accuracy", None, "every answer is a number"),
        (["one", "two", "three"], "rouge_l", None, "free text"),
        (["a long answer " * 9] * 10, "rouge_l", None, "free text"),
    ],
)
def test_metric_is_guessed_and_said(answers, metric, labels, said: str) -> None:
    info, notes = guess("mine", answers)
    assert (info.metric, info.labels) == (metric, labels)
    assert said in notes[0]
    assert "mine" in notes[0]


def test_known_name_with_other_answers_is_guessed() -> None:
    rows = {"train": [Row("p", "yes"), Row("q", "no")] * 3}
    info, notes = resolve("amazon", rows)
    assert info.labels == ("no", "yes")
    assert "not among the labels" in notes[0]
    known, silence = resolve("Amazon", {"train": [Row("p", "neutral")]})
    assert known.labels == KNOWN["amazon"].labels
    assert silence == []


def test_labels_of_the_data_win() -> None:
    info, notes = resolve("RTE", {"train": [Row("p", "yes")]}, ("yes", "no"))
    assert (info.labels, notes) == (("yes", "no"), [])
    info, notes = resolve("mine", {"train": [Row("p", "yes")]}, ("yes", "no"))
    assert info.labels == ("yes", "no")
    assert len(notes) == 1
