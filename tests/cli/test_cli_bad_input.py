"""Bad input: one clear line, the documented exit code, nothing lost, no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import run_command, toy_arguments, toy_rows, write_task

MODEL = object()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = {"train": toy_rows(0, 6), "eval": toy_rows(0, 2, 6), "test": toy_rows(0, 3, 8)}
    write_task(tmp_path / "data", "alpha", rows)
    return tmp_path / "data"


def check(outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err
    assert outcome.out == ""


USAGE = [
    (["--tasks", "FOMCC"], ["'FOMCC'", "FOMC"]),
    (["--tasks", "FOMC,FOMC"], ["'FOMC' is named twice"]),
    (["--tasks", "../x"], ["../x"]),
    (["--tasks", "a/b"], ["a/b"]),
    (["--tasks", ","], ["no tasks given"]),
    (["--method", "treelore"], ["unknown method 'treelore'", "did you mean", "treelora"]),
    (["--set", "optim.lrr=1"], ["unknown key 'optim.lrr'", "'lr'"]),
    (["--set", "method.lamda=1"], ["unknown key 'lamda'", "'lambda'"]),
    (["--set", "optim.lr"], ["section.key=value"]),
    (["--set", "optim.lr=abc"], ["optim.lr"]),
    (["--recipe", "quikstart"], ["unknown recipe 'quikstart'", "quickstart"]),
    (["--recipe", "./none.yaml"], ["does not exist"]),
    (["--epochs", "0"], ["optim.epochs"]),
    (["--seed", "-1"], ["stream.seed"]),
    (["--limit", "0"], ["limit"]),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=lambda value: "-".join(value)[:40])
def test_usage(treelora, tmp_path, arguments: list[str], words: list[str]) -> None:
    run = tmp_path / "run"
    check(treelora("train-stream", "--run-dir", run, *arguments), 2, *words)
    assert not run.exists()


def test_an_unknown_flag_is_a_usage_error(treelora) -> None:
    outcome = treelora("train-stream", "--taks", "A")
    assert outcome.code == 2
    assert "--tasks" in outcome.err


def test_data_without_a_model(treelora, data, tmp_path) -> None:
    outcome = treelora(
        "train-stream", "--tasks", "alpha", "--data", data, "--run-dir", tmp_path / "r"
    )
    check(outcome, 2, "needs a model")


def train(treelora, model: Path, data: Path, run: Path, tasks: str = "alpha", *more: str):
    return treelora(*toy_arguments(model, data, run, tasks, *more))


def test_missing_folders(treelora, tiny_model, data, tmp_path) -> None:
    run = tmp_path / "run"
    check(train(treelora, tiny_model, tmp_path / "none", run), 3, "none")
    check(train(treelora, tmp_path / "no-model", data, run), 3, "no-model", "does not exist")
    check(train(treelora, tiny_model, data, run, "alpha,beta"), 2, "beta", "alpha")
    assert not run.exists()


def test_malformed_json_is_placed(treelora, tiny_model, data, tmp_path) -> None:
    file = data / "alpha" / "train.json"
    text = file.read_text()
    file.write_text(text.replace('"answer"', '"answer', 1))
    outcome = train(treelora, tiny_model, data, tmp_path / "run")
    check(outcome, 3, "alpha", "train.json:")
    assert not (tmp_path / "run").exists()


def test_row_without_answer(treelora, tiny_model, data, tmp_path) -> None:
    file = data / "alpha" / "train.json"
    rows = json.loads(file.read_text())
    del rows[2]["answer"]
    file.write_text(json.dumps(rows))
    check(train(treelora, tiny_model, data, tmp_path / "run"), 3, "train.json", "answer")


def test_empty_split(treelora, tiny_model, data, tmp_path) -> None:
    (data / "alpha" / "test.json").write_text("[]")
    check(train(treelora, tiny_model, data, tmp_path / "run"), 3, "test.json")


def test_prompt_and_answer_beyond_the_positions(treelora, tiny_model, data, tmp_path) -> None:
    outcome = train(
        treelora, tiny_model, data, tmp_path / "run", "alpha", "--set", "data.max_prompt_tokens=250"
    )
    check(outcome, 2, "256 positions", "--set data.max_prompt_tokens=")


def test_run_directory_problems(treelora, tiny_model, data, tmp_path) -> None:
    for command in (["report"], ["eval"], ["tree", "show"]):
        check(treelora(*command, tmp_path / "none"), 4, "there is no run directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for command in (["report"], ["eval"], ["tree", "show"]):
        check(treelora(*command, tmp_path / "other"), 4, "no run.json")
    outcome = train(treelora, tiny_model, data, tmp_path / "other")
    check(outcome, 4, "thesis.txt")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "other").iterdir() if p.suffix) == ["thesis.txt"]


def test_another_base_is_refused(treelora, tiny_model, data, tmp_path) -> None:
    from support import make_checkpoint

    run = tmp_path / "run"
    assert train(treelora, tiny_model, data, run).code == 0
    other = make_checkpoint(tmp_path / "other", "mistral")
    before = (run / "recipe.yaml").read_bytes()
    outcome = treelora("train-stream", "--run-dir", run, "--model", other)
    check(outcome, 2, "made with the base")
    assert (run / "recipe.yaml").read_bytes() == before
    check(treelora("eval", run, "--model", other), 2, "made with the base")


def test_eval_mistakes(treelora, tiny_model, data, tmp_path) -> None:
    run = tmp_path / "run"
    assert train(treelora, tiny_model, data, run).code == 0
    check(treelora("eval", run, "--adapter", "newest"), 2, "latest, own, route or task:NAME")
    check(treelora("eval", run, "--adapter", "task:alpa"), 2, "did you mean 'alpha'")
    check(treelora("eval", run, "--tasks", "beta"), 2, "'beta' is not in this run")


def test_a_damaged_recipe_or_run_json(treelora, tiny_model, data, tmp_path) -> None:
    run = tmp_path / "run"
    assert train(treelora, tiny_model, data, run).code == 0
    good = (run / "run.json").read_text()
    (run / "run.json").write_text(good[: len(good) // 2])
    for command in (["report", run], ["eval", run], ["train-stream", "--run-dir", run]):
        check(treelora(*command), 4, "run.json")
    (run / "run.json").write_text(good.replace('"format_version": 1', '"format_version": 2'))
    for command in (["report", run], ["eval", run], ["train-stream", "--run-dir", run]):
        check(treelora(*command), 4, "newer version")


def test_errors_in_json_mode_are_json(treelora, tmp_path) -> None:
    outcome = treelora("report", tmp_path / "none", "--json")
    assert outcome.code == 4
    document = json.loads(outcome.out)
    assert document["schema_version"] == 1
    assert document["error"]["code"] == 4
    assert "run directory" in document["error"]["message"]


def test_debug_shows_a_traceback(tmp_path) -> None:
    done = run_command("--debug", "report", str(tmp_path / "none"))
    assert done.returncode == 4
    assert "Traceback" in done.stderr
    assert "error: there is no run directory" in done.stderr


@pytest.mark.parametrize(("command", "flag"), [("tree show", ""), ("report", "--json")])
def test_a_reader_that_has_seen_enough(treelora, tiny_model, data, tmp_path, command, flag) -> None:
    run = tmp_path / "run"
    assert train(treelora, tiny_model, data, run).code == 0
    import subprocess
    import sys

    code = "from treelora_cli.cli.app import main; main()"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        f'"{sys.executable}" -c "{code}" {command} "{run}" {flag} | true; '
        'echo "${PIPESTATUS[0]}"',
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr
    assert done.stdout.splitlines()[-1] == "0"
