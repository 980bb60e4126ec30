"""Tables of every format: the same rows whatever the file, and every column mapping is said."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.conversation import Conversation, Turn
from treelora_cli.errors import DataError, EnvironmentProblem, UsageError
from treelora_cli.tasks import arrowrows
from treelora_cli.tasks.columns import Columns, columns_of, parse_columns
from treelora_cli.tasks.fingerprint import fingerprint
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import available, load_found, load_tasks
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.source import Loaded
from treelora_cli.tasks.tables import Table, read_table
from treelora_cli.tasks.types import Row

ROWS = [{"question": f"Was ist {n}?", "answer": f"{n}.50"} for n in range(20)]


def load_one(data: Path, name: str, columns: Columns | None = None) -> Loaded:
    (loaded,) = load_found(detect(data, columns), [name])
    return loaded


def rows_of(loaded: Loaded) -> set[Row]:
    return {row for rows in loaded.task.splits.values() for row in rows}


def table_of(path: Path) -> Table:
    problems = Problems()
    table = read_table(path, problems)
    problems.raise_if_any()
    return table


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- one file of any format ----------------------------------------------------------------


def write_arrow(path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)


@pytest.mark.parametrize(
    "name",
    ["t.jsonl", "t.json", "t.csv", "semicolons.csv", "T.TSV", "t.parquet", "file.arrow", "s.arrow"],
)
def test_one_file_is_one_task_whatever_its_format(write, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith((".json", ".jsonl")):
        write(name, ROWS)
    elif name.lower().endswith((".csv", ".tsv")):
        mark = {"t.csv": ",", "semicolons.csv": ";", "T.TSV": "\t"}[name]
        write(name, as_csv(ROWS, mark))
    else:
        write_arrow(path, {"t.parquet": "parquet", "file.arrow": "file", "s.arrow": "stream"}[name])
    assert available(path) == [path.stem]
    loaded = load_one(path, path.stem)
    assert rows_of(loaded) == {Row(row["question"], row["answer"]) for row in ROWS}
    assert loaded.mapped == "question -> prompt, answer -> answer"
    assert loaded.task.metric == "accuracy"
    assert any("accuracy guessed (every answer is a number)" in note for note in loaded.notes)
    assert str(tmp_path) not in loaded.task.source
    # The task is the same data in every format: only its name enters the fingerprint beside them.
    renamed = fingerprint("t", "accuracy", "whole", loaded.task.splits, loaded.task.separator)
    reference = load_one(write("ref/t.jsonl", ROWS), "t").task.fingerprint
    assert renamed == reference


def test_a_folder_may_hold_every_format(write, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write("data/lines.jsonl", ROWS)
    write("data/comma.csv", as_csv(ROWS))
    write_arrow(tmp_path / "data/park.parquet", "parquet")
    for split in ("train", "validation", "test"):
        write(f"data/folder/{split}.tsv", as_csv(ROWS, "\t"))
    write("data/odd.csv", "a,b\n1,2\n")
    write("data/notes.txt", "x")
    found = detect(tmp_path / "data")
    assert sorted(found.tasks) == ["comma", "folder", "lines", "park"]
    assert "no known pair of columns: 'a', 'b'" in found.ignored["odd.csv"]
    assert "notes.txt" in found.ignored
    assert len(load_one(tmp_path / "data", "folder").task.splits["eval"]) == 20


def test_parquet_class_numbers_become_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["Bad", "Good"])}
    )
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(20)]
    rows[3]["label"] = -1
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "films.parquet")
    with pytest.raises(DataError, match=r"films\.parquet: row 4: label: found null"):
        load_one(tmp_path / "films.parquet", "films")
    (loaded,) = load_found(detect(tmp_path / "films.parquet"), ["films"], "skip")
    assert loaded.task.labels == ("Bad", "Good")
    assert Row("film 0", "Bad") in rows_of(loaded)
    assert len(rows_of(loaded)) == 19


def test_files_that_are_not_what_they_are_called(write, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name, kind in (("a.parquet", "Parquet"), ("a.arrow", "Arrow")):
        path = write(name, "question,answer\n")
        with pytest.raises(DataError, match=f"{name}: not {kind}: ") as caught:
            load_tasks(["a"], path)
        assert "\n" not in caught.value.message
    with pytest.raises(DataError, match=r"a\.txt: not a format that is read") as caught:
        detect(write("a.txt", "x"))
    assert ".parquet" in caught.value.hint
    with pytest.raises(DataError, match="not a regular file"):
        detect(Path("/dev/zero"))
    with pytest.raises(UsageError, match="cannot be a task name"):
        load_tasks(["my task"], write("my task.csv", as_csv(ROWS)))


def test_parquet_without_its_package_names_the_extra(write, monkeypatch, tmp_path: Path) -> None:
    path = write("a.parquet", "x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EnvironmentProblem) as caught:
        load_tasks(["a"], path)
    assert caught.value.hint == "pip install 'treelora[datasets]'"
    assert caught.value.exit_code == 6
    assert arrowrows.names_of(path) is None


# --- CSV -----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ODD = st.lists(st.sampled_from(" \n\r\t,;|\"'\0\u2028x"), min_size=1).map("".join).filter(str.strip)


@given(
    st.lists(st.fixed_dictionaries({"prompt": TEXT | ODD, "answer": TEXT | ODD}), min_size=1),
    st.sampled_from(",;\t|"),
)
def test_any_text_survives_csv(tmp_path_factory, rows, delimiter: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(as_csv(rows, delimiter).encode("utf-8"))
    assert [dict(record.fields) for record in table_of(path).records] == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\np,a\np\n", ":3: row: found 1 fields, expected 2"),
        ('prompt,answer\n"a\nb",c\np,q,r\n', ":4: row: found 3 fields, expected 2"),
        ('prompt,answer\np,a\n"p,a\n', ":3: not CSV: unexpected end of data"),
        ("prompt,prompt\np,a\n", ":1: columns: found 'prompt' twice"),
        ("", ": found an empty file"),
        ("\n\n", ": found an empty file"),
    ],
)
def test_bad_csv_is_placed(write, text: str, said: str) -> None:
    path = write("t.csv", text)
    with pytest.raises(DataError) as caught:
        table_of(path)
    assert f"{path}{said}" in caught.value.message


def test_csv_places_count_lines_not_rows(write) -> None:
    path = write("t.csv", '\ufeffprompt,answer\r\n"a\r\nb",c\r\n\r\np,a\r\n')
    records = table_of(path).records
    assert [str(record.where) for record in records] == [f"{path}:2", f"{path}:5"]
    assert records[0].fields == {"prompt": "a\r\nb", "answer": "c"}


# --- columns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["id", "instruction", "input", "output"], "instruction (+ input) -> prompt, output -> "),
        (["instruction", "context", "response"], "instruction (+ context) -> prompt, response -> "),
        (["messages", "prompt", "prompt_id"], "messages: last assistant turn -> answer"),
        (["conversations", "system"], "conversations: last assistant turn -> answer"),
        (["sentence", "label", "idx"], "sentence -> prompt, label -> answer"),
    ],
)
def test_known_columns(names: list[str], expected: str) -> None:
    assert str(columns_of(names)).startswith(expected)


def test_columns_of_the_users_own(write) -> None:
    path = write(
        "t.csv", as_csv([{"frage": f"f{n}", "extra": "e", "antwort": "a"} for n in range(9)])
    )
    with pytest.raises(DataError, match=r"t\.csv:2: columns: found 'frage', 'extra'") as caught:
        load_one(path, "t")
    assert "--columns prompt=COLUMN,answer=COLUMN" in caught.value.hint
    own = parse_columns("prompt=frage, answer=antwort, input=extra")
    assert Row("f1\ne", "a") in rows_of(load_one(path, "t", own))
    with pytest.raises(DataError, match="expected frage and nichts"):
        load_one(path, "t", parse_columns("prompt=frage,answer=nichts"))


def test_columns_named_make_a_file_of_a_folder_a_task(write, tmp_path: Path) -> None:
    write("data/t.csv", as_csv([{"frage": f"f{n}", "antwort": "a"} for n in range(9)]))
    own = parse_columns("prompt=frage,answer=antwort")
    assert list(detect(tmp_path / "data", own).tasks) == ["t"]
    with pytest.raises(DataError, match="no task found"):
        detect(tmp_path / "data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt", "not of the form KEY=COLUMN"),
        ("prompt=a", "give prompt and answer, or messages alone"),
        ("prompt=a,answer=", "not of the form KEY=COLUMN"),
        ("prompt=a,answr=b", "unknown key 'answr'"),
        ("prompt=a,prompt=b", "prompt is given twice"),
        ("prompt=a,answer=b,messages=c", "messages holds prompt and answer already"),
        ("messages=c,input=d", "give prompt and answer, or messages alone"),
    ],
)
def test_mistakes_in_columns_are_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_columns(text)
    assert caught.value.hint


def test_a_column_that_begins_later_is_not_lost(write) -> None:
    rows = [{"instruction": f"i{n}", "output": "a"} for n in range(9)]
    rows[5]["input"] = "more"
    loaded = load_one(write("t.jsonl", rows), "t")
    assert Row("i5\nmore", "a") in rows_of(loaded)


# --- conversations -------------------------------------------------------------------------


def say(*turns: tuple[str, str], keys: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    return [{keys[0]: who, keys[1]: text} for who, text in turns]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations(write, tmp_path: Path, keys: tuple[str, str], kind: str) -> None:
    names = ("human", "gpt") if keys[0] == "from" else ("user", "assistant")
    user, assistant = names
    column = "conversations" if keys[0] == "from" else "messages"
    several = say(
        ("system", "s"), (user, "q1"), (assistant, "a1"), (user, "q2"), (assistant, "a2"),
        (user, "thanks"), keys=keys,
    )  # fmt: skip
    rows = [{column: say((user, f"q {n}"), (assistant, "a"), keys=keys)} for n in range(9)]
    rows.append({column: several})
    if kind == "parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    else:
        write("t.jsonl", rows)
    loaded = load_one(tmp_path / f"t.{kind}", "t")
    by_answer = {row.answer: row.prompt for row in rows_of(loaded)}
    assert type(by_answer["a"]) is str
    assert by_answer["a"].startswith("q ")
    talk = by_answer["a2"]
    assert isinstance(talk, Conversation)
    assert talk == "System: s\nUser: q1\nAssistant: a1\nUser: q2\nAssistant:"
    assert talk.turns == (
        Turn("system", "s"), Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"),
    )  # fmt: skip
    assert any("1 conversations go on after the last assistant" in note for note in loaded.notes)


def test_system_text_beside_the_turns_comes_first(write) -> None:
    rows = [
        {"system": "s", "conversations": say(("human", f"q{n}"), ("gpt", "a"))} for n in range(9)
    ]
    (row, *_) = load_one(write("t.jsonl", rows), "t").task.splits["train"]
    assert isinstance(row.prompt, Conversation)
    assert row.prompt.turns[0] == Turn("system", "s")


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "no turn of the user with an answer after it"),
        (say(("human", "q")), "no turn of the user with an answer after it"),
        (say(("gpt", "a")), "no turn of the user with an answer after it"),
        (say(("human", "q"), ("gpt", " ")), "turn 2: value: found empty text"),
        (say(("human", "q"), ("tool", "a")), "turn 2: found role 'tool', expected one of system"),
        ([{"who": "human"}], "turn 1: found an object, expected from and value or role and conte"),
        (["q", "a"], "turn 1: found 'q', expected from and value"),
        ("q", "found 'q', expected a list of turns"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "turn 1: content: found a list, expect",
        ),
    ],
)
def test_conversations_that_make_no_row(write, turns, said: str) -> None:
    good = {"conversations": say(("human", "q"), ("gpt", "a"))}
    path = write("t.jsonl", [good, {"conversations": turns}])
    with pytest.raises(DataError) as caught:
        load_one(path, "t")
    assert f"{path}:2: conversations: " in caught.value.message
    assert said in caught.value.message


def test_turns_enter_the_fingerprint() -> None:
    one = Conversation([Turn("user", "a\nAssistant: b"), Turn("user", "c")])
    two = Conversation([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")])
    assert str(one) == str(two)
    of = [fingerprint("T", "f1", "whole", {"train": [Row(p, "x")]}) for p in (one, two, str(one))]
    assert len(set(of)) == 3


def test_conversations_can_be_copied_and_sent() -> None:
    import copy
    import multiprocessing.reduction as reduction

    talk = Conversation([Turn("system", "s"), Turn("user", "q")])
    assert copy.deepcopy(talk).turns == talk.turns
    assert reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(talk)).turns == talk.turns
