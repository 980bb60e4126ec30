"""The layouts: what is found in a folder, and how rows become prompts and answers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from treelora_cli.errors import DataError, UsageError
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import available, load_found, load_tasks
from treelora_cli.tasks.read_plain import split_by_hash
from treelora_cli.tasks.source import Loaded, guess_separator
from treelora_cli.tasks.types import Row

INSTRUCTIONS = '{"SC": [{"instruction_type": "zero-shot", "instruction": "Good or bad?\\n"}]}'


def load_one(data: Path, name: str) -> Loaded:
    (loaded,) = load_found(detect(data), [name])
    return loaded


@pytest.fixture
def cl(write) -> Path:
    """An O-LoRA folder with one group that has an instruction and one that has none."""
    rows = [{"sentence": f"film {at}", "label": ("Good", "Bad")[at % 2]} for at in range(6)]
    for split in ("train", "dev", "test"):
        write(
            f"cl/SC/Films/{split}.json",
            [{**row, "sentence": f"{split} {row['sentence']}"} for row in rows],
        )
        write(f"cl/COPA/COPA/{split}.json", [{"sentence": "Which? A or B.\n", "label": "A"}])
    write("cl/SC/Films/labels.json", '["Good", "Bad"]')
    write("cl/COPA/COPA/labels.json", '["A", "B"]')
    return write("cl/instruction_config.json", INSTRUCTIONS).parent


# --- TRACE ---------------------------------------------------------------------------------


def test_trace_rows_come_as_they_are(trace, tmp_path: Path) -> None:
    trace("FOMC", say="  Lead \n")
    loaded = load_one(tmp_path / "data", "FOMC")
    assert loaded.layout == "trace"
    assert loaded.task.splits["train"][1] == Row("  Lead \nFOMC train 1:", "B")
    assert loaded.task.separator == ""
    assert loaded.task.labels == ("A", "B", "C")
    assert loaded.task.source == "trace layout, FOMC/"
    assert loaded.notes == ()


def test_bad_rows_of_several_files_and_tasks_come_in_one_error(trace, write, tmp_path) -> None:
    trace("FOMC")
    trace("C-STANCE")
    write("data/FOMC/eval.json", '[\n{"prompt": "p"}\n]')
    write("data/C-STANCE/test.json", "[\n{]\n]")
    write("data/C-STANCE/train.json", b"\xff\xfe")
    with pytest.raises(DataError) as caught:
        load_tasks(["FOMC", "C-STANCE"], tmp_path / "data")
    lines = caught.value.message.splitlines()
    assert lines[0] == "2 problems in the data:"
    assert "FOMC/eval.json:1: answer" not in lines[1]
    assert "FOMC/eval.json:2: answer: missing" in lines[1]
    # An unreadable file ends its own task only.
    assert "C-STANCE/train.json: found UTF-16" in lines[2]
    assert "UTF-8" in caught.value.hint


def test_missing_split_is_named(trace, tmp_path: Path) -> None:
    trace("FOMC")
    (tmp_path / "data/FOMC/test.json").unlink()
    with pytest.raises(DataError, match="FOMC/: no test file"):
        load_tasks(["FOMC"], tmp_path / "data")


# --- O-LoRA --------------------------------------------------------------------------------


def test_cl_prompt_is_instruction_options_sentence(cl: Path) -> None:
    assert detect(cl).ignored == {}
    loaded = load_one(cl, "Films")
    row = loaded.task.splits["eval"][1]
    assert row == Row("Good or bad?\nOption: Good, Bad \ndev film 1\nAnswer:", "Bad")
    assert loaded.task.separator == " "
    assert loaded.task.labels == ("Good", "Bad")
    assert loaded.task.metric == "accuracy"
    assert "Films" not in row.prompt


def test_cl_group_without_instruction_and_sentence_with_newline(cl: Path) -> None:
    (row,) = load_one(cl, "COPA").task.splits["test"]
    assert row.prompt == "Which? A or B.\nAnswer:"


def test_cl_group_given_directly_finds_the_instructions_above(cl: Path) -> None:
    assert load_one(cl / "SC", "Films").task.fingerprint == load_one(cl, "Films").task.fingerprint


def test_cl_without_instruction_file_says_so(cl: Path) -> None:
    (cl / "instruction_config.json").unlink()
    loaded = load_one(cl, "Films")
    assert loaded.task.splits["test"][0].prompt == "test film 0\nAnswer:"
    assert any("no instruction_config.json" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("SC/Films/labels.json", "[]", "expected a list of labels"),
        ("SC/Films/labels.json", '["Good", null]', "found the label null"),
        ("SC/Films/labels.json", '["Good", "Good"]', "a label occurs twice"),
        ("SC/Films/labels.json", '["Good"', "labels.json:1:8: not JSON"),
        ("SC/Films/labels.json", '["Good"]', "label: found 'Bad', expected one of: Good"),
        ("instruction_config.json", "[]", "expected an object of groups"),
        ("instruction_config.json", '{"SC": "x"}', "SC: found 'x', expected a list"),
        ("instruction_config.json", '{"SC": [{}]}', "SC: an entry has no instruction text"),
        ("SC/Films/test.json", '[{"sentence": "x", "label": null}]', "label: found null"),
        ("SC/Films/test.json", "[]", "found no rows"),
    ],
)
def test_cl_problems_are_named(cl: Path, write, name: str, content: str, said: str) -> None:
    write(f"cl/{name}", content)
    with pytest.raises(DataError) as caught:
        load_tasks(["Films"], cl)
    assert said in caught.value.message
    assert caught.value.message.count(str(cl)) >= 1


# --- plain ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "P", "answer": "A"}, Row("P", "A")),
        ({"prompt": "P", "completion": "A"}, Row("P", "A")),
        ({"instruction": "P", "input": "I", "output": "A"}, Row("P\nI", "A")),
        ({"instruction": "P", "input": "", "output": "A"}, Row("P", "A")),
        ({"instruction": "P", "input": None, "output": "A"}, Row("P", "A")),
        ({"instruction": "P", "output": "A"}, Row("P", "A")),
        ({"input": "P", "output": "A"}, Row("P", "A")),
        ({"id": 3, "question": "P", "answer": "A"}, Row("P", "A")),
        ({"text": "P", "label": 1}, Row("P", "1")),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_plain_columns(write, tmp_path: Path, row, expected: Row, suffix: str) -> None:
    for split in ("train", "valid", "test"):
        write(f"data/mine/{split}.{suffix}", [row])
    task = load_one(tmp_path / "data", "mine").task
    assert task.splits == dict.fromkeys(("train", "eval", "test"), (expected,))


def test_unknown_columns_are_named(write, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(f"data/mine/{split}.jsonl", [{"q": "x", "a": "y"}])
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: columns: found 'q', 'a'; expected one of"
    ):
        load_tasks(["mine"], tmp_path / "data")


def test_input_that_is_no_text_is_named(write, tmp_path: Path) -> None:
    row = {"instruction": "P", "input": ["x"], "output": "A"}
    for split in ("train", "eval", "test"):
        write(f"data/mine/{split}.jsonl", [row])
    with pytest.raises(DataError, match=r"train\.jsonl:1: input: found a list"):
        load_tasks(["mine"], tmp_path / "data")


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {at}", "answer": f"free text {at}"} for at in range(count)]


def test_single_file_is_split_and_says_so(write, tmp_path: Path) -> None:
    write("data/mine.jsonl", rows_of(50) + rows_of(5))
    loaded = load_one(tmp_path / "data", "mine")
    splits = loaded.task.splits
    prompts = {split: {row.prompt for row in rows} for split, rows in splits.items()}
    assert {split: len(found) for split, found in prompts.items()} == {
        "train": 40,
        "eval": 5,
        "test": 5,
    }
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["eval"]
    assert sum(map(len, splits.values())) == 55
    assert any("one file, split by a hash of the prompts" in note for note in loaded.notes)
    assert any("rouge_l guessed" in note for note in loaded.notes)


def test_split_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [Row(f"question {at}", "a") for at in range(40)]
    parts = split_by_hash(rows, ("test", "eval"))
    turned = split_by_hash(rows[::-1], ("test", "eval"))
    assert {name: set(found) for name, found in parts.items()} == {
        name: set(found) for name, found in turned.items()
    }
    assert parts["train"] == tuple(row for row in rows if row in parts["train"])
    hashed = sorted(rows, key=lambda row: hashlib.sha256(f"1234\n{row.prompt}".encode()).digest())
    assert set(parts["test"]) == set(hashed[:4])
    assert set(parts["eval"]) == set(hashed[4:8])


def test_missing_evaluation_file_is_taken_from_training(write, tmp_path: Path) -> None:
    write("data/mine/train.jsonl", rows_of(20))
    write("data/mine/test.jsonl", rows_of(3))
    loaded = load_one(tmp_path / "data", "mine")
    assert {split: len(rows) for split, rows in loaded.task.splits.items()} == {
        "train": 18,
        "eval": 2,
        "test": 3,
    }
    assert any("no evaluation file, training rows split" in note for note in loaded.notes)


def test_too_few_rows_to_split(write, tmp_path: Path) -> None:
    write("data/mine.jsonl", rows_of(2))
    with pytest.raises(DataError, match="found 2 rows with 2 different prompts, too few"):
        load_tasks(["mine"], tmp_path / "data")


def test_empty_plain_files(write, tmp_path: Path) -> None:
    for split in ("train", "eval", "test"):
        write(f"data/mine/{split}.jsonl", rows_of(2))
    write("data/mine/eval.jsonl", "\n")
    with pytest.raises(DataError, match=r"eval\.jsonl: found an empty file"):
        load_tasks(["mine"], tmp_path / "data")


@pytest.mark.parametrize(
    ("prompts", "separator"),
    [(["a:", "b?"], " "), (["a: ", "b\n"], ""), (["态度：", "问？"], ""), (["a:", "b\n"], " ")],
)
def test_separator_is_guessed_from_the_prompts(prompts: list[str], separator: str) -> None:
    assert guess_separator(prompts)[0] == separator


# --- finding -------------------------------------------------------------------------------


def test_layouts_may_stand_side_by_side(cl: Path, trace, write, tmp_path: Path) -> None:
    trace("FOMC")
    cl.joinpath("SC").rename(tmp_path / "data/SC")
    write("data/mine.json", rows_of(5))
    write("data/notes.txt", "x")
    write("data/other.json", '{"a": 1}')
    write("data/empty/readme.md", "x")
    found = detect(tmp_path / "data")
    assert {name: source.layout for name, source in found.tasks.items()} == {
        "FOMC": "trace",
        "Films": "cl_benchmark",
        "mine": "plain",
    }
    assert found.layouts == ("cl_benchmark", "plain", "trace")
    assert set(found.ignored) == {"notes.txt", "other.json", "empty"}


def test_unknown_task_proposes_a_name(trace, write, tmp_path: Path) -> None:
    trace("FOMC")
    trace("Py150")
    write("data/odd.json", '[{"a": 1}]')
    with pytest.raises(UsageError) as caught:
        load_tasks(["fomc"], tmp_path / "data")
    assert caught.value.hint == "did you mean 'FOMC'? known: FOMC, Py150"
    assert caught.value.exit_code == 2
    assert available(tmp_path / "data") == ["FOMC", "Py150"]


def test_passed_over_file_asked_for_by_name_says_why(trace, write, tmp_path: Path) -> None:
    trace("FOMC")
    write("data/odd.json", '[{"a": 1}]')
    with pytest.raises(UsageError) as caught:
        load_tasks(["odd"], tmp_path / "data")
    assert "no known pair of columns: 'a'" in caught.value.hint


@pytest.mark.parametrize("name", ["../FOMC", "a b", "", "x" * 65, "FOMC/"])
def test_bad_task_names_are_refused(trace, tmp_path: Path, name: str) -> None:
    trace("FOMC")
    with pytest.raises(UsageError, match="cannot be a task name"):
        load_tasks([name], tmp_path / "data")


def test_task_named_twice_is_refused(trace, tmp_path: Path) -> None:
    trace("FOMC")
    with pytest.raises(UsageError, match="'FOMC' is named 2 times"):
        load_tasks(["FOMC", "FOMC"], tmp_path / "data")


def test_two_tasks_of_one_name_are_refused(trace, write, tmp_path: Path) -> None:
    trace("FOMC")
    write("data/FOMC.jsonl", rows_of(5))
    with pytest.raises(DataError, match=r"two tasks are called 'FOMC': FOMC/ and FOMC\.jsonl"):
        detect(tmp_path / "data")


def test_wrong_folder_points_at_the_right_one(trace, cl: Path, tmp_path: Path) -> None:
    trace("FOMC")
    with pytest.raises(DataError) as above:
        detect(tmp_path)
    assert f"{tmp_path / 'data'} (1 task)" in above.value.hint
    assert f"{cl} (2 tasks)" in above.value.hint
    with pytest.raises(DataError, match="the folder of one task") as below:
        detect(tmp_path / "data/FOMC")
    assert "--tasks FOMC" in below.value.hint
    with pytest.raises(DataError, match="found nothing, expected data"):
        detect(tmp_path / "gone")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no task found"):
        detect(tmp_path / "void")
