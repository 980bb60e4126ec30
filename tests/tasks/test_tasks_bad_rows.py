"""`--on-bad-row`: refuse, leave out and count, or keep what was left out to be mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from treelora_cli.cli.prepare import prepare
from treelora_cli.errors import DataError, TreeloraError, UsageError
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import load_found, load_tasks

app = typer.Typer()
app.command()(prepare)

GOOD = [{"prompt": f"p {n}", "answer": "ab"[n % 2]} for n in range(30)]
BAD = [
    ('{"prompt": "p"}', "answer: missing"),
    ('{"prompt": "p", "answer": " "}', "answer: empty"),
    ('{"prompt": "p", "answer": ""}', "answer: empty"),
    ('{"prompt": 1.50, "answer": null}', "prompt: not text"),
    ('{"prompt": "p", "answer": "a"', "not JSON"),
    ("[1]", "not an object"),
    ('{"prompt": "\\ud800", "answer": "a"}', "prompt: broken text"),
    ('{"prompt": "p", "answer": "a", "answer": "b"}', "key repeated"),
]


def run(*args: object):
    """Run the command; an error of ours is raised."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, TreeloraError):
        raise result.exception
    assert result.exception is None, result.output
    return result


@pytest.fixture
def mixed(write) -> Path:
    """Thirty good rows with eight bad ones between them."""
    lines = [json.dumps(row) for row in GOOD]
    for at, (text, _) in enumerate(BAD):
        lines.insert(3 * at + 1, text)
    return write("data/mine.jsonl", "\n".join(lines) + "\n")


def left_in(out: Path) -> int:
    (task,) = load_tasks(["mine"], out)
    return sum(map(len, task.splits.values()))


def test_error_is_the_default_and_names_the_way_out(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 problems in the data") as caught:
        run("--source", mixed, "--out", tmp_path / "out")
    assert "mine.jsonl:2: answer: missing" in caught.value.message
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError) as caught:
        load_tasks(["mine"], mixed.parent)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError) as caught:
        load_tasks(["mine"], _write_one(mixed, '{"prompt": "p"}'))
    assert "treelora prepare --on-bad-row skip|quarantine" in caught.value.hint


def _write_one(beside: Path, line: str) -> Path:
    folder = beside.parent / "one"
    folder.mkdir()
    (folder / "mine.jsonl").write_text(json.dumps(GOOD[0]) + "\n" + line + "\n")
    return folder


def test_skip_counts_every_row_once(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--source", mixed.parent, "--out", out, "--on-bad-row", "skip")
    reasons = {"answer: empty": 2} | {reason: 1 for _, reason in BAD if reason != "answer: empty"}
    entry = json.loads((out / "prepared.json").read_text("utf-8"))["tasks"]["mine"]
    assert entry["bad_rows"] == reasons
    assert next(iter(entry["bad_rows"])) == "answer: empty"
    assert left_in(out) == 30
    assert not (out / "quarantine").exists()
    assert "warning: mine: 8 rows left out (answer: empty: 2, answer: missing: 1" in result.stderr
    clean = load_found(detect(mixed), ["mine"], "skip")[0].task
    assert load_tasks(["mine"], out)[0].fingerprint == clean.fingerprint


def test_quarantine_keeps_the_rows_with_their_places(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--source", mixed.parent, "--out", out, "--on-bad-row", "quarantine", "--json")
    document = json.loads(run(*arguments).stdout)
    assert document["tasks"][0]["bad_rows"]["not JSON"] == 1
    assert any("8 rows left out" in warning for warning in document["warnings"])
    lines = (out / "quarantine/mine.jsonl").read_text("utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    assert [(row["file"], row["line"], row["reason"]) for row in kept] == [
        ("mine.jsonl", 3 * at + 2, reason) for at, (_, reason) in enumerate(BAD)
    ]
    assert kept[3]["row"] == {"prompt": 1.5, "answer": None}
    assert kept[3]["what"] == "prompt: found the number 1.50, expected text"
    assert kept[4]["row"] == BAD[4][0]
    assert left_in(out) == 30
    assert json.loads(run(*arguments).stdout)["status"] == "unchanged"
    # Another run without bad rows takes the quarantine away; nothing else is touched.
    mixed.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    assert json.loads(run(*arguments).stdout)["status"] == "replaced"
    assert not (out / "quarantine").exists()


def test_other_formats(write, trace, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    write("data/table.csv", "prompt,answer\np,a\nq,a\np\nq,\nr,a\ns,b\nt,b\n")
    rows = [{"prompt": f"p{n}", "answer": None if n == 4 else "a"} for n in range(20)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data/park.parquet")
    talk = [{"messages": [{"role": "user", "content": f"q{n}"}] * 2} for n in range(2)]
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    talk += [{"messages": [{**good[0], "content": f"q{n}"}, good[1]]} for n in range(9)]
    write("data/talk.jsonl", talk)
    trace("FOMC")
    write("data/FOMC/train.json", [{"prompt": "p", "answer": "A"}, {"prompt": "p", "answer": ""}])
    out = tmp_path / "out"
    run("--source", tmp_path / "data", "--out", out, "--on-bad-row", "quarantine")
    found = {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted((out / "quarantine").iterdir())
    }
    told = {
        name: [(row["file"], row.get("line", row.get("row_number")), row["reason"]) for row in rows]
        for name, rows in found.items()
    }
    assert told == {
        "FOMC": [("FOMC/train.json", 3, "answer: empty")],
        "park": [("park.parquet", 5, "answer: not text")],
        "table": [
            ("table.csv", 4, "wrong number of fields"),
            ("table.csv", 5, "answer: empty"),
        ],
        "talk": [
            ("talk.jsonl", 1, "messages: no question and answer"),
            ("talk.jsonl", 2, "messages: no question and answer"),
        ],
    }
    assert "row_number" in found["park"][0]
    # What was prepared is a task like any other.
    assert len(load_tasks(["FOMC", "park", "table", "talk"], out)) == 4


def test_labels_that_are_not_known_are_left_out(write, tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = [{"sentence": f"{split} {n}", "label": "Good"} for n in range(3)]
        write(f"cl/SC/Films/{split}.json", [*rows, {"sentence": "x", "label": "Fair"}])
    write("cl/SC/Films/labels.json", '["Good", "Bad"]')
    (loaded,) = load_found(detect(tmp_path / "cl"), ["Films"], "skip")
    assert [row.reason for row in loaded.bad_rows] == ["label: not a known one"] * 3
    assert len(loaded.task.splits["train"]) == 3


def test_files_that_cannot_be_read_are_errors_all_the_same(write, tmp_path: Path) -> None:
    write("data/a.json", '[{"prompt": "p", "answer": "a"},\n{"prompt"]')
    write("data/b.jsonl", '{"prompt": ""}\n')
    write("data/c.csv", 'prompt,answer\n"p,a\n')
    for name, said in (("a", "not JSON"), ("b", "expected one of prompt/"), ("c", "not CSV")):
        with pytest.raises(DataError, match=said):
            load_found(detect(tmp_path / "data"), [name], "skip") if name != "b" else load_found(
                detect(tmp_path / "data/b.jsonl"), ["b"], "skip"
            )
    path = write("only.jsonl", '{"prompt": "", "answer": "a"}\n' * 3)
    with pytest.raises(DataError, match="found no rows"):
        load_found(detect(path), ["only"], "skip")


def test_choices_are_checked_and_one_name_is_taken(mixed: Path, write, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["--source", str(mixed), "--out", str(tmp_path / "o"), "--on-bad-row", "ignore"]
    )
    assert result.exit_code == 2
    path = write("quarantine.jsonl", GOOD)
    with pytest.raises(UsageError, match="cannot be called 'quarantine'"):
        run("--source", path, "--out", tmp_path / "out")
