"""`treelora prepare`: what it writes, what it refuses, and that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from treelora_cli.cli.prepare import prepare
from treelora_cli.errors import DataError, TreeloraError, UsageError
from treelora_cli.tasks.inspect import duplicates, shared_prompts, token_lengths
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import load_found, load_tasks
from treelora_cli.tasks.store import store
from treelora_cli.tasks.types import Row, Task

app = typer.Typer()
app.command()(prepare)


def run(*args: object):
    """Run the command; an error of ours is raised."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, TreeloraError):
        raise result.exception
    assert result.exception is None, result.output
    return result


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def data(trace, tmp_path: Path) -> Path:
    trace("FOMC", say="Höhe \u2028 利率\n")
    trace("MeetingBank", answers=("Eine Zusammenfassung. ", " zwei"))
    return tmp_path / "data"


def test_prepared_tasks_are_the_same_tasks(data: Path, tmp_path: Path) -> None:
    result = run("--source", data, "--out", tmp_path / "out")
    before = load_tasks(["FOMC", "MeetingBank"], data)
    after = load_tasks(["FOMC", "MeetingBank"], tmp_path / "out")
    assert after == before
    assert [task.splits for task in after] == [task.splits for task in before]
    assert "FOMC" in result.stdout
    assert "rouge_l" in result.stdout
    assert f"written {tmp_path / 'out'}" in result.stderr
    assert "FOMC: trace layout; prompt -> prompt, answer -> answer; labels A, B, C" in result.stderr


def test_index_tells_rows_hashes_and_settings(data: Path, tmp_path: Path) -> None:
    run("--source", data, "--out", tmp_path / "out", "--tasks", "FOMC")
    index = json.loads((tmp_path / "out/prepared.json").read_text("utf-8"))
    assert index["format"] == 1
    assert list(index["tasks"]) == ["FOMC"]
    entry = index["tasks"]["FOMC"]
    assert entry["metric"] == "accuracy"
    assert entry["labels"] == ["A", "B", "C"]
    assert entry["language"] == "en"
    assert entry["layout"] == "trace"
    for split in ("train", "eval", "test"):
        raw = (tmp_path / f"out/FOMC/{split}.jsonl").read_bytes()
        assert entry["files"][split] == {"rows": 4, "sha256": hashlib.sha256(raw).hexdigest()}
        assert raw.count(b"\n") == 4
    assert str(tmp_path) not in json.dumps(index)


def test_the_same_run_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    run("--source", data, "--out", tmp_path / "a", "--tasks", "FOMC,MeetingBank")
    run("--source", data, "--out", tmp_path / "b", "--tasks", "MeetingBank,FOMC")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    inode = (tmp_path / "a").stat().st_ino
    again = run("--source", data, "--out", tmp_path / "a")
    assert "unchanged" in again.stderr
    assert (tmp_path / "a").stat().st_ino == inode


def test_other_content_replaces_and_says_what(data: Path, trace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--source", data, "--out", out)
    trace("FOMC", say="new ")
    trace("Py150")
    result = run("--source", data, "--out", out, "--tasks", "FOMC,Py150")
    assert f"replaced {out} (FOMC changed, MeetingBank dropped, Py150 added)" in result.stderr
    assert not (out / "MeetingBank").exists()
    assert load_tasks(["FOMC"], out) == load_tasks(["FOMC"], data)


def test_json_is_one_document(data: Path, tmp_path: Path) -> None:
    result = run("--source", data, "--out", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["status"] == "written"
    assert [task["name"] for task in document["tasks"]] == ["FOMC", "MeetingBank"]
    assert document["tasks"][0]["duplicates"]["train"] == 0


def test_folders_with_other_things_are_refused(data: Path, write, tmp_path: Path) -> None:
    kept = write("mine/letter.txt", "dear")
    with pytest.raises(UsageError, match=r"found letter\.txt, which is not prepared data"):
        run("--source", data, "--out", tmp_path / "mine")
    assert kept.read_text() == "dear"
    with pytest.raises(UsageError, match="found a file, expected a folder"):
        run("--source", data, "--out", kept)
    (tmp_path / "empty").mkdir()
    run("--source", data, "--out", tmp_path / "empty")
    guest = write("empty/FOMC/own.txt", "dear")
    with pytest.raises(UsageError, match=r"found FOMC/own\.txt among the data"):
        run("--source", data, "--out", tmp_path / "empty", "--tasks", "FOMC")
    assert guest.read_text() == "dear"


def test_source_is_never_replaced(data: Path, tmp_path: Path) -> None:
    for out in (data, tmp_path):
        with pytest.raises(UsageError, match="would replace the source"):
            run("--source", data, "--out", out)
    out = tmp_path / "out"
    run("--source", data, "--out", out)
    with pytest.raises(UsageError, match="would replace the source"):
        run("--source", out, "--out", out)
    # A prepared folder can be the source of another one.
    run("--source", out, "--out", tmp_path / "again")
    assert load_tasks(["FOMC"], tmp_path / "again") == load_tasks(["FOMC"], data)


def test_bad_rows_leave_the_old_folder_alone(data: Path, write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--source", data, "--out", out)
    before = bytes_of(out)
    write("data/FOMC/eval.json", '[\n{"prompt": "p", "answer": ""}\n]')
    with pytest.raises(DataError, match=r"eval\.json:2: answer: found empty text"):
        run("--source", data, "--out", out)
    assert bytes_of(out) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("FOMC/test.jsonl", lambda raw: raw + raw, "changed since it was prepared"),
        ("FOMC/test.jsonl", lambda raw: raw.replace(b'"A"', b'"B"'), "changed since it was prep"),
        ("FOMC/test.jsonl", None, "no such file"),
        ("prepared.json", lambda raw: raw[: len(raw) // 2], r"prepared\.json:\d+:\d+: not JSON"),
        ("prepared.json", lambda raw: b"[]", "not an index of prepared tasks"),
        (
            "prepared.json",
            lambda raw: raw.replace(b'"format": 1', b'"format": 2'),
            "found format 2, expected 1",
        ),
        (
            "prepared.json",
            lambda raw: raw.replace(b'"separator": ""', b'"separator": "x"'),
            "do not match the fingerprint",
        ),
        (
            "prepared.json",
            lambda raw: raw.replace(b'"metric": "accuracy"', b'"metric": 1'),
            "metric: found the number 1, expected text",
        ),
        (
            "prepared.json",
            lambda raw: raw.replace(b'"max_answer_tokens": 16', b'"max_answer_tokens": -1'),
            "max_answer_tokens: found the number -1, expected a count",
        ),
        (
            "prepared.json",
            lambda raw: raw.replace(b'"files"', b'"filed"'),
            "files: found null, expected an object",
        ),
    ],
)
def test_edited_prepared_folder_is_refused(data, tmp_path, name, change, said) -> None:
    run("--source", data, "--out", tmp_path / "out", "--tasks", "FOMC")
    path = tmp_path / "out" / name
    raw = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(raw))
        assert path.read_bytes() != raw
    with pytest.raises(DataError, match=said):
        load_tasks(["FOMC"], tmp_path / "out")


def test_leftovers_of_a_killed_run_are_cleared(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--source", data, "--out", out)
    before = bytes_of(out)
    # Killed between setting the old folder aside and renaming the new one.
    out.rename(tmp_path / ".out.old-1-0123abcd")
    (tmp_path / ".out.tmp-1-0123abce").mkdir()
    (tmp_path / ".other.tmp-1-0123abcf").mkdir()
    assert "unchanged" in run("--source", data, "--out", out).stderr
    assert bytes_of(out) == before
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == [".other.tmp-1-0123abcf"]


def test_writers_of_one_folder_take_turns(data: Path, tmp_path: Path) -> None:
    loaded = load_found(detect(data), ["FOMC", "MeetingBank"])
    seen: list[str] = []

    def work() -> None:
        seen.append(store(loaded, tmp_path / "out", [data]).status)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["unchanged"] * 5 + ["written"]


# --- duplicates and lengths ----------------------------------------------------------------


def task_of(name: str, train: list[str], evaluation: list[str], test: list[str]) -> Task:
    lists = {"train": train, "eval": evaluation, "test": test}
    splits = {split: tuple(Row(p, "A") for p in prompts) for split, prompts in lists.items()}
    return Task(name, "accuracy", "en", 16, splits, "f")


def test_duplicates_are_counted_within_and_between() -> None:
    task = task_of("T", ["a b", "A  b\n", "c"], ["c", "d"], ["d", "A B", "e", "e"])
    assert duplicates(task) == {
        "train": 1,
        "eval": 0,
        "test": 1,
        "eval_in_train": 1,
        "test_in_train": 1,
        "test_in_eval": 1,
    }


def test_test_prompts_in_another_tasks_training_rows_are_found() -> None:
    tasks = [task_of("T", ["a"], ["b"], ["x", "y"]), task_of("U", ["X", "z"], ["b"], ["z"])]
    assert [str(found) for found in shared_prompts(tasks)] == [
        "1 test prompts of T are in the train rows of U"
    ]


def test_duplicates_are_shown(write, tmp_path: Path) -> None:
    for split in ("train", "eval", "test"):
        write(f"data/T/{split}.json", [{"prompt": "same", "answer": "A"}] * 2)
    result = run("--source", tmp_path / "data", "--out", tmp_path / "out")
    assert "3 + 6" in result.stdout
    assert "warning: T: 2 test prompts are also in train" in result.stderr
    assert "note: T: not a known task; accuracy guessed" in result.stderr


def test_percentiles_are_lengths_of_rows() -> None:
    task = task_of("T", ["x" * n for n in range(1, 201)], [], [])
    found = token_lengths(task, lambda texts: [len(text) for text in texts])
    assert found["prompt"] == {"p50": 100, "p90": 180, "p99": 198, "max": 200}
    assert found["answer"] == {"p50": 1, "p90": 1, "p99": 1, "max": 1}


def test_model_measures_tokens(data: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.save_pretrained(tmp_path / "model")
    result = run("--source", data, "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert "prompt p99" in result.stdout
    index = json.loads((tmp_path / "out/prepared.json").read_text("utf-8"))
    # "Höhe 利率 FOMC train 0 :" is six tokens.
    assert index["tasks"]["FOMC"]["tokens"]["prompt"]["max"] == 6
    assert index["tokenizer"] == str(tmp_path / "model")

    (tmp_path / "void").mkdir()
    for model, said in ((tmp_path / "gone", "no such folder"), (tmp_path / "void", "no tokenizer")):
        with pytest.raises(DataError, match=said) as caught:
            run("--source", data, "--out", tmp_path / "new", "--model", model)
        assert caught.value.hint
    assert not (tmp_path / "new").exists()


def test_training_prompts_in_two_tasks_are_reported_once(trace, write, tmp_path: Path) -> None:
    trace("FOMC")
    rows = [{"prompt": "FOMC train 1:", "answer": "A"}, {"prompt": "fomc  Train 2:", "answer": "A"}]
    for split in ("train", "eval", "test"):
        write(f"data/Own/{split}.jsonl", rows if split == "train" else rows[:1])
    result = run("--source", tmp_path / "data", "--out", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert document["shared_prompts"] == [
        {"task": "Own", "split": split, "other": "FOMC", "other_split": "train", "rows": rows}
        for split, rows in (("test", 1), ("eval", 1), ("train", 2))
    ]
    assert "2 train prompts of Own are in the train rows of FOMC" in document["warnings"]
    assert document["tasks"][1]["duplicates"]["test_in_train"] == 1


def test_conversations_come_back_with_their_turns(write, tmp_path: Path) -> None:
    from treelora_cli.conversation import Conversation

    rows = [
        {
            "messages": [
                {"role": "system", "content": "s \u2028"},
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": "a"},
            ]
        }
        for n in range(12)
    ]
    write("data/talk.jsonl", rows)
    run("--source", tmp_path / "data", "--out", tmp_path / "out")
    (before,) = load_tasks(["talk"], tmp_path / "data")
    (after,) = load_tasks(["talk"], tmp_path / "out")
    assert after == before
    for left, right in zip(before.splits["train"], after.splits["train"], strict=True):
        assert isinstance(left.prompt, Conversation)
        assert isinstance(right.prompt, Conversation)
        assert left.prompt.turns == right.prompt.turns


def test_several_sources_and_a_file_of_names(data: Path, write, tmp_path: Path) -> None:
    extra = write("mine.csv", "question,answer\n" + "".join(f"q{n},{n}\n" for n in range(12)))
    names = write("names.txt", "mine\nFOMC\n")
    out = tmp_path / "out"
    run("--source", data, "--source", extra, "--out", out, "--tasks", f"@{names}")
    index = json.loads((out / "prepared.json").read_text("utf-8"))
    assert list(index["tasks"]) == ["FOMC", "mine"]
    assert index["tasks"]["FOMC"]["default_epochs"] == 1
    assert index["tasks"]["mine"]["default_epochs"] is None
    with pytest.raises(UsageError, match="would replace the source"):
        run("--source", data, "--source", extra, "--out", tmp_path)


def test_columns_are_for_tables_only(data: Path, write, tmp_path: Path) -> None:
    write("data/mine.csv", "frage,antwort\n" + "".join(f"q{n},{n}\n" for n in range(12)))
    arguments = ("--source", data, "--out", tmp_path / "out", "--columns")
    arguments = (*arguments, "prompt=frage,answer=antwort")
    with pytest.raises(UsageError, match="--columns does not apply to FOMC, MeetingBank"):
        run(*arguments)
    result = run(*arguments, "--tasks", "mine")
    assert "mine: plain layout; frage -> prompt, antwort -> answer" in result.stderr
