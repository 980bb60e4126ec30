"""Ways to name a stream: lists, files, sweeps, and a look before the leap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, run_command, toy_arguments

from treelora_cli.cli.names import names_from
from treelora_cli.engine.sweep import plan_sweep
from treelora_cli.errors import UsageError


def test_names_from_text_and_file(tmp_path: Path) -> None:
    assert names_from(None) is None
    assert names_from("a, b,,c ") == ["a", "b", "c"]
    file = tmp_path / "tasks.txt"
    file.write_text("\ufeffa\n\n# a comment\nb, c  # two\n", encoding="utf-8")
    assert names_from(f"@{file}") == ["a", "b", "c"]
    with pytest.raises(UsageError, match="No such file"):
        names_from(f"@{tmp_path / 'none'}")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="not UTF-8"):
        names_from(f"@{tmp_path / 'bad'}")


def test_dry_run_says_what_would_happen_and_does_nothing(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, "alpha,beta", "--dry-run")
    outcome = treelora(*arguments)
    assert outcome.code == 0, outcome
    assert "nothing was run" in outcome.out
    plan = json.loads(treelora(*arguments, "--json").out)
    assert not run.exists()
    assert [task["steps"] for task in plan["tasks"]] == [6, 6]
    assert [task["status"] for task in plan["tasks"]] == ["new", "new"]
    real = [part for part in arguments if part != "--dry-run"]
    started = json.loads(treelora(*real, "--json").out.splitlines()[0])
    assert started["trainable_parameters"] == plan["trainable_parameters"]
    again = json.loads(treelora(*arguments, "--json").out)
    assert [task["status"] for task in again["tasks"]] == ["finished", "finished"]
    adapter = run / "tasks" / "000-alpha" / "adapter" / "adapter_model.safetensors"
    assert adapter.stat().st_size >= 4 * plan["trainable_parameters"]


def test_dry_run_fails_as_the_run_would(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    for more, code in (
        (["--set", "data.max_prompt_tokens=250"], 2),
        (["--set", "lora.targets=[nothing]"], 2),
        (["--model", str(tmp_path / "none")], 3),
        (["--tasks", "alfa"], 2),
        (["--set", "processes.engine=zero2"], 2),
        (["--set", "processes.engine=zero2", "--nproc", "2", "--method", "gem"], 2),
        (["--set", "processes.engine=fsdp2", "--nproc", "2", "--method", "seqft"], 2),
    ):
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, "alpha"), *more, "--dry-run")
        assert outcome.code == code, outcome
    assert not run.exists()


def test_dry_run_of_processes_that_are_not_started(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", "--dry-run")
    alone = json.loads(treelora(*arguments, "--json").out)
    eight = json.loads(treelora(*arguments, "--json", "--nproc", "8").out)
    assert (alone["processes"], eight["processes"]) == (1, 8)
    assert eight["activation_bytes"] < alone["activation_bytes"]  # rows of a step are shared out
    shared = [*arguments, "--nproc", "8", "--set", "processes.engine=fsdp2"]
    outcome = treelora(*shared, "--json")
    assert json.loads(outcome.out)["memory_bytes"] < eight["memory_bytes"]
    said = " ".join(treelora(*shared).out.split())
    assert "in each of 8 processes" in said
    assert "free for each" in said
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_ordinary_runs_and_can_be_repeated(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    parent = tmp_path / "sweep"
    arguments = toy_arguments(tiny_model, toy_data, parent, "alpha,beta")
    sweep = [*arguments, "--methods", "seqlora,per-task", "--seeds", "1,2", "--epochs", "1"]
    assert treelora(*sweep).code == 0
    names = ["per-task-seed1", "per-task-seed2", "seqlora-seed1", "seqlora-seed2"]
    assert json.loads((parent / "sweep.json").read_text()) == {"format": 1, "runs": names}
    scores = {name: (parent / name / "scores.json").read_bytes() for name in names}
    again = treelora(*sweep)
    assert again.err.count("nothing to do") == 4
    assert {name: (parent / name / "scores.json").read_bytes() for name in names} == scores
    seeds = [json.loads((parent / name / "run.json").read_text())["seed"] for name in names]
    assert seeds == [1, 2, 1, 2]
    check = treelora("train-stream", "--run-dir", parent / names[0], "--seeds", "1")
    assert check.code == 2
    assert "is a run directory" in check.err


def test_sweep_mistakes(tmp_path: Path) -> None:
    assert [run.path.name for run in plan_sweep(tmp_path, ["seqlora", "treelora"], [1, 2])] == [
        "seqlora-seed1", "treelora-seed1", "seqlora-seed2", "treelora-seed2",
    ]  # fmt: skip
    for methods, seeds in ((["seqlor"], [1]), ([], [1]), (["seqlora"], []),
                           (["seqlora", "seqlora"], [1]), (["seqlora"], [1, 1])):  # fmt: skip
        with pytest.raises(UsageError):
            plan_sweep(tmp_path, methods, seeds)


def test_tasks_are_trained_as_their_names_arrive(tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, "-", "--json", "--epochs", "1")
    code = "from treelora_cli.cli.app import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None

    def until(kind: str) -> dict[str, object]:
        for line in child.stdout:
            event = json.loads(line)
            if event["kind"] == kind:
                return event
        raise AssertionError(f"no {kind} event")

    try:
        until("waiting")
        holder = json.loads((run / "lock").read_text())
        assert holder["note"] == "waiting for task names"
        for name in ("alpha", "beta"):
            child.stdin.write(f"{name}\n")
            child.stdin.flush()
            assert until("task_finished")["task"] == name
            until("waiting")
        child.stdin.write("alpha\n")
        child.stdin.flush()
        assert until("skipped")["task"] == "alpha"
        child.stdin.close()
        assert until("run_finished")["tasks"] == ["alpha", "beta"]
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
    whole = tmp_path / "whole"
    done = run_command(*toy_arguments(tiny_model, toy_data, whole, "alpha,beta", "--epochs", "1"))
    assert done.returncode == 0, done.stderr
    assert (run / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    assert (run / "tree" / "tree.json").read_bytes() == (whole / "tree" / "tree.json").read_bytes()
    assert (run / "recipe.yaml").read_bytes() == (whole / "recipe.yaml").read_bytes()


def test_names_from_a_pipe_and_what_does_not_go_with_it(tiny_model, toy_data, tmp_path) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "-", "--epochs", "1")
    done = run_command(*arguments, stdin="alpha, beta\nalfa")
    assert done.returncode == 2, done.stderr
    assert "alfa" in done.stderr
    assert sorted(p.name for p in (tmp_path / "run" / "tasks").iterdir()) == [
        "000-alpha",
        "001-beta",
    ]
    for more in (["--dry-run"], ["--seeds", "1"], ["--set", "eval.when=last"]):
        done = run_command(*arguments, *more, stdin="")
        assert done.returncode == 2, done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "treelora_cli", "--version"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("treelora ")


COMMANDS = ["prepare", "train-stream", "tree show", "eval", "report", "merge", "export", "methods",
            "recipes", "builtin path", "builtin export", "builtin pretrain"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_and_json(treelora, command: str) -> None:
    outcome = treelora(*command.split(), "--help")
    assert outcome.code == 0
    first = outcome.out.split("Options")[0]
    assert f"treelora {command}" in first.split("Usage")[-1].split("\n", 1)[1]
    assert "--json" in outcome.out


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_spin_briefly_unless_told_otherwise(
    treelora, monkeypatch, given: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the command sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert treelora("--version").code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_other_libraries_warnings_are_not_the_users_business() -> None:
    import logging

    from treelora_cli.cli.logs import ours_or_errors

    def record(name: str, level: int) -> logging.LogRecord:
        return logging.LogRecord(name, level, __file__, 1, "text", None, None)

    assert ours_or_errors(record("treelora", logging.INFO))
    assert ours_or_errors(record("treelora.tasks", logging.WARNING))
    assert not ours_or_errors(record("huggingface_hub.utils._http", logging.WARNING))
    assert not ours_or_errors(record("treelorable", logging.WARNING))
    assert ours_or_errors(record("huggingface_hub", logging.ERROR))
