"""Ways to name a stream: lists, files, sweeps, and a look before the leap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import toy_arguments

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
    ):
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, "alpha"), *more, "--dry-run")
        assert outcome.code == code, outcome
    assert not run.exists()


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
