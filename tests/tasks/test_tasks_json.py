"""Strict reading: every kind of bad row is named with its place, good text comes through whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.errors import DataError
from treelora_cli.tasks.jsonrows import read_records, text_of
from treelora_cli.tasks.problems import MOST_SHOWN, Problems
from treelora_cli.tasks.read_trace import read_pairs
from treelora_cli.tasks.store import jsonl
from treelora_cli.tasks.types import Row


def problems_of(path: Path) -> str:
    problems = Problems()
    read_pairs(path, problems)
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    assert caught.value.exit_code == 3
    return caught.value.message


def rows_of(path: Path) -> tuple[Row, ...]:
    problems = Problems()
    rows = read_pairs(path, problems)
    problems.raise_if_any()
    return rows


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "p"}', "answer: missing, expected text"),
        ('{"answer": "a"}', "prompt: missing, expected text"),
        ('{"prompt": "p", "answer": null}', "answer: found null, expected text"),
        ('{"prompt": "p", "answer": true}', "answer: found true, expected text"),
        ('{"prompt": "p", "answer": ["a"]}', "answer: found a list, expected text"),
        ('{"prompt": {"a": 1}, "answer": "a"}', "prompt: found an object, expected text"),
        ('{"prompt": 7, "answer": "a"}', "prompt: found the number 7, expected text"),
        ('{"prompt": "p", "answer": NaN}', "answer: found nan, expected text"),
        ('{"prompt": "p", "answer": ""}', "answer: found empty text, expected some text"),
        ('{"prompt": " \\n\\t", "answer": "a"}', "prompt: found empty text, expected some text"),
        ('{"prompt": "\\ud800", "answer": "a"}', "prompt: found half of a surrogate pair"),
        ('{"prompt": "p", "answer": "a", "answer": "b"}', "'answer': found twice in one row"),
        ('"just text"', "row: found 'just text', expected an object"),
        ("[1, 2]", "row: found a list, expected an object"),
    ],
)
def test_bad_row_is_named_in_lists_and_lines(write, row: str, said: str) -> None:
    lines = write("t.jsonl", f"{GOOD}\n{GOOD}\n{row}\n")
    listed = write("t.json", f"[\n{GOOD},\n{row}\n]")
    assert problems_of(lines).startswith(f"{lines}:3: {said}")
    assert problems_of(listed).startswith(f"{listed}:3: {said}")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (GOOD + '\n{"prompt": "p", "answer" "a"}\n', ":2:26: not JSON: Expecting ':'"),
        (GOOD + '\n{"prompt": "p", "answer": "a', ":2:27: not JSON: Unterminated string"),
        (GOOD + GOOD + "\n", ":1:31: not JSON: Extra data"),
        (GOOD + ",\n" + GOOD + "\n", ":1:31: not JSON: Extra data"),
        ("[\n" + GOOD + ",\n]\n", ":3:1: not JSON: Expecting a row after ','"),
        ("[\n" + GOOD + "\n" + GOOD + "\n]\n", ":3:1: not JSON: Expecting ',' or ']'"),
        ("[\n" + GOOD + ",\n" + GOOD[:-2], ":3:27: not JSON: Unterminated string"),
        ("[\n" + GOOD + "\n]\nmore", ":4: not JSON: text after the end of the list"),
        ("[\n" + GOOD, ":2:31: not JSON: Expecting ',' or ']'"),
        ('{"prompt": "a\tb", "answer": "a"}\n', ":1:14: not JSON: Invalid control character"),
        ("prompt,answer\n", ":1:1: not JSON: Expecting value"),
        ("", ": found an empty file"),
        ("  \n \n", ": found an empty file"),
        ("[ ]", ": found no rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_json_is_placed(write, text: str, place: str) -> None:
    path = write("t.json", text)
    message = problems_of(path)
    assert message.startswith(str(path))
    assert place in message


def test_first_problems_are_shown_and_all_counted(write) -> None:
    bad = "".join('{"prompt": "p"}\n' for _ in range(25))
    path = write("t.jsonl", bad)
    message = problems_of(path)
    assert message.splitlines()[0] == "25 problems in the data, the first 10 of them:"
    assert message.count("answer: missing") == MOST_SHOWN
    assert f"{path}:10: " in message
    assert f"{path}:11: " not in message


def test_line_of_a_pretty_printed_row_is_where_it_starts(write) -> None:
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": ""}]
    path = write("t.json", rows, pretty=True)
    assert f"{path}:6: answer: found empty text" in problems_of(path)
    assert len(rows_of(write("u.json", rows[:1] * 3, pretty=True))) == 3


def test_byte_order_mark_and_crlf_are_taken(write) -> None:
    text = f"{GOOD}\r\n\r\n{GOOD}\r\n"
    assert rows_of(write("t.jsonl", b"\xef\xbb\xbf" + text.encode())) == (Row("p", "a"),) * 2


def test_other_encodings_are_refused_with_their_place(write) -> None:
    latin = write("t.jsonl", f"{GOOD}\n".encode() + '{"prompt": "für"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.jsonl:2: found byte 0xfc, which is not UTF-8"):
        rows_of(latin)
    with pytest.raises(DataError, match="UTF-16"):
        rows_of(write("u.jsonl", GOOD.encode("utf-16")))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        rows_of(tmp_path / "gone.json")
    with pytest.raises(DataError, match="not a regular file"):
        rows_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="not a regular file"):
        rows_of(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="not a regular file"):
        rows_of(Path("/dev/zero"))


def test_numbers_are_answers_exactly_as_written(write) -> None:
    written = ["7", "-0", "1.50", "1e5", "12345678901234567890123", "0.10"]
    path = write("t.jsonl", "".join(f'{{"prompt": "p", "answer": {n}}}\n' for n in written))
    rows = rows_of(path)
    assert [row.answer for row in rows] == written
    assert all(type(row.answer) is str for row in rows)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_unusual_line_separators_stay_in_the_text(write, separator: str) -> None:
    raw = json.dumps({"prompt": f"a{separator}b", "answer": "c"}, ensure_ascii=False)
    assert rows_of(write("t.jsonl", f"{raw}\n{GOOD}\n"))[0].prompt == f"a{separator}b"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ODD = st.sampled_from('\u2028\u2029\x85\r\n\t\0\ufeff\u202e"\\/{}[],:')
ODD_TEXT = st.lists(TEXT | ODD, min_size=1).map("".join).filter(str.strip)


@given(st.lists(st.builds(Row, TEXT | ODD_TEXT, TEXT | ODD_TEXT), min_size=1))
def test_any_text_survives_writing_and_reading(tmp_path_factory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("rows") / "t.jsonl"
    data = jsonl(rows)
    path.write_bytes(data)
    assert list(rows_of(path)) == rows
    # Any reader that splits lines in its own way finds one row a line.
    assert len(data.decode().splitlines()) == len(rows)


def test_text_of_numbers_only_where_allowed(write) -> None:
    problems = Problems()
    (record,) = read_records(write("t.jsonl", '{"label": 1}\n'), problems)
    assert text_of(record, "label", problems, numbers=True) == "1"
    assert len(problems) == 0
    assert text_of(record, "label", problems) is None
    assert len(problems) == 1
