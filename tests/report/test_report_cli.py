from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from report_fixtures import make_run, names_for, score
from typer.testing import CliRunner

from treelora_cli.cli import tree as tree_command
from treelora_cli.cli.report import report as report_command
from treelora_cli.errors import RunDirError, UsageError

ROOT = Path(__file__).resolve().parents[2]
app = typer.Typer()
app.command("report")(report_command)
app.add_typer(tree_command.app, name="tree")


def call(*args, code=0):
    """Run a command in this process; an error of ours comes out as itself."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def command(*args, **settings):
    """Start `treelora` in a process of its own."""
    code = "from treelora_cli.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment,
        timeout=60,
        check=False,
        **settings,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("cli") / "run", tasks=3)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("cli") / "half", tasks=3, learned=2)


def test_text_goes_to_stdout(run):
    result = call("report", run)
    assert "treelora on meta-llama/Llama-3.2-1B-Instruct" in result.stdout
    assert f"[{100 * score(2, 2):.1f}]" in result.stdout
    assert result.stderr == ""


def test_the_command_to_repeat_is_one_line_that_can_be_copied(run):
    lines = call("report", run).stdout.splitlines()
    assert "  treelora train-stream --tasks C-STANCE,FOMC,MeetingBank --seed 1234" in lines


@pytest.mark.parametrize("flags", [["--json"], ["--format", "json"]])
def test_json_on_stdout(run, half, flags):
    one = json.loads(call("report", run, *flags).stdout)
    assert one["schema_version"] == 1
    assert one["adapter_mode"] == "latest"
    assert one["op"] == pytest.approx(sum(score(2, j) for j in range(3)) / 3)
    two = json.loads(call("report", run, half, *flags).stdout)
    assert [entry["tasks_learned"] for entry in two["runs"]] == [3, 2]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("r.html", "<!doctype html>"),
        ("r.md", "# treelora on"),
        ("r.json", "{\n"),
        ("r.txt", "treelora on"),
        ("r.csv", "kind,group,run,method"),
        ("r.tex", "% Made by"),
    ],
)
def test_the_suffix_of_out_chooses_the_format(run, tmp_path, name, start):
    out = tmp_path / name
    result = call("report", run, "--out", out)
    assert out.read_text().startswith(start)
    assert result.stdout == ""
    assert f"wrote {out}" in result.stderr.replace("\n", "")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_json_file_is_the_document_of_stdout(run, tmp_path):
    call("report", run, "--out", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(
        call("report", run, "--json").stdout
    )


def test_pages_on_stdout_are_the_files(run, tmp_path):
    for name, chosen in (("r.html", "html"), ("r.md", "md"), ("r.csv", "csv"), ("r.tex", "latex")):
        call("report", run, "--out", tmp_path / name)
        assert call("report", run, "--format", chosen).stdout == (tmp_path / name).read_text()


def test_an_old_report_stays_when_the_new_one_fails(run, tmp_path):
    out = tmp_path / "r.html"
    out.write_text("old")
    with pytest.raises(RunDirError):
        call("report", run, tmp_path / "nowhere", "--out", out)
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    "args",
    [
        ["--out", "r.pdf"],
        ["--out", "report"],
        ["--format", "htlm"],
        ["--json", "--format", "html"],
        ["--out", "missing/r.html"],
        ["--out", "."],
        ["--out", ".", "--format", "html"],
    ],
)
def test_wrong_use_is_refused_with_a_hint(run, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        call("report", run, *args)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_errors_have_their_exit_codes(tmp_path, run):
    assert command("report", tmp_path, capture_output=True).returncode == 4
    assert command("report", run, "--out", "r.pdf", capture_output=True).returncode == 2


def test_neither_command_imports_torch(run):
    code = (
        "import sys\n"
        "from treelora_cli.cli.app import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for args in (
        ["report", run],
        ["report", run, "--format", "html"],
        ["report", run, "--format", "md"],
        ["report", run, "--format", "csv"],
        ["report", run, "--format", "latex"],
        ["tree", "show", run],
        ["tree", "show", run, "--json"],
        ["tree", "show", run, "--format", "svg"],
        ["tree", "show", run, "--format", "dot"],
        ["tree", "show", run, "--format", "mermaid"],
        ["tree", "show", run, "--diff", "C-STANCE", "FOMC"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("args", [["report"], ["report", "--json"], ["tree", "show"]])
def test_a_reader_that_has_seen_enough_causes_no_message(run, args):
    reading, writing = os.pipe()
    os.close(reading)
    done = command(*args, run, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b""


def test_the_tree_as_text_names_every_task_and_its_split(run):
    shown = call("tree", "show", run).stdout
    for name in names_for(3):
        assert name in shown
    assert "0.125" in shown
    assert "split principal" in shown
    assert "treelora on meta-llama/Llama-3.2-1B-Instruct, after MeetingBank (3 tasks)" in shown


def test_the_tree_of_built_in_things_says_so(tmp_path):
    run = make_run(tmp_path / "run", builtin=True, model="tiny")
    assert "tiny (built-in, synthetic)" in call("tree", "show", run).stdout


def test_a_damaged_tree_is_reported(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "tree" / "tree.json").write_text('{"format": 1, "tasks": ["a"], "nodes": [{}]}')
    for args in (["report"], ["tree", "show"]):
        with pytest.raises(RunDirError, match=r"tree\.json"):
            call(*args, run)


def test_the_tree_as_json_is_the_document(run):
    for flags in (["--json"], ["--format", "json"]):
        document = json.loads(call("tree", "show", run, *flags).stdout)
        assert document.pop("schema_version") == 1
        assert document == json.loads((run / "tree" / "tree.json").read_text())


def test_the_tree_as_it_was(run):
    document = json.loads(call("tree", "show", run, "--at", "FOMC", "--json").stdout)
    assert document["tasks"] == ["C-STANCE", "FOMC"]
    assert "MeetingBank" not in call("tree", "show", run, "--at", "FOMC").stdout


def test_the_tree_at_an_unknown_task(run):
    with pytest.raises(UsageError) as caught:
        call("tree", "show", run, "--at", "fomcc")
    assert "'FOMC'" in caught.value.hint
    with pytest.raises(UsageError):
        call("tree", "show", run, "--at", "../000-C-STANCE")


def test_the_tree_at_a_task_that_is_not_finished(half):
    with pytest.raises(RunDirError, match="no tree after MeetingBank"):
        call("tree", "show", half, "--at", "MeetingBank")
    assert "FOMC" in call("tree", "show", half).stdout


def test_a_method_without_a_tree(tmp_path):
    run = make_run(tmp_path / "run", method="seqlora", tree=False)
    for extra in ([], ["--at", "FOMC"]):
        with pytest.raises(RunDirError) as caught:
            call("tree", "show", run, *extra)
        assert "seqlora" in caught.value.hint


def test_an_unknown_tree_format(run):
    with pytest.raises(UsageError, match="dott"):
        call("tree", "show", run, "--format", "dott")


def test_no_run_directory(tmp_path):
    for args in (["report"], ["tree", "show"]):
        with pytest.raises(RunDirError):
            call(*args, tmp_path / "nowhere")
