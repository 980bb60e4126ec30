"""Processes that were given different things are told so, before any of them begins."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, free_port, toy_arguments, toy_rows, write_task

from treelora_cli.engine.alike import check_same_inputs, check_same_recipe
from treelora_cli.engine.world import ALONE, World, noticing
from treelora_cli.errors import EnvironmentProblem, UsageError
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import ModelSection, Recipe
from treelora_cli.tasks.load import load_tasks


@dataclass(frozen=True)
class Said(World):
    """A world in which another process says something else."""

    other: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.other]


def test_what_torch_says_of_a_broken_group_is_one_sentence() -> None:
    said = (
        "[/t/gloo/pair.cc:591] Read error [127.0.0.1]:9: Connection reset by peer. Perhaps a bug."
    )
    with pytest.raises(EnvironmentProblem) as found, noticing():
        raise RuntimeError(said)
    assert found.value.message.endswith("(Read error [127.0.0.1]:9: Connection reset by peer)")


def test_one_other_setting_is_named() -> None:
    mine = Recipe()
    theirs = mine.model_copy(update={"optim": mine.optim.model_copy(update={"lr": 0.5})})
    check_same_recipe(mine, Said(other=[mine.to_yaml()]))
    check_same_recipe(mine, ALONE)
    with pytest.raises(UsageError, match=r"process 2 has other settings.*lr: 0\.5"):
        check_same_recipe(mine, Said(other=[mine.to_yaml(), theirs.to_yaml()]))
    longer = mine.to_yaml() + "limit: 7\n"
    with pytest.raises(UsageError, match="'limit: 7' for 'nothing'"):
        check_same_recipe(mine, Said(other=[longer]))


def test_other_rows_and_another_base_are_named(tiny_model: Path, toy_data: Path) -> None:
    tasks = load_tasks(["alpha", "beta"], str(toy_data))
    base = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    same = {f"the rows of task {task.name}": task.fingerprint for task in tasks}
    same["the weights of the base"] = base.fingerprint
    check_same_inputs(tasks, base, Said(other=[dict(same)]))
    with pytest.raises(UsageError, match=r"process 1 .* the rows of task beta differ"):
        check_same_inputs(tasks, base, Said(other=[same | {"the rows of task beta": "x"}]))
    with pytest.raises(UsageError, match="the weights of the base differ"):
        check_same_inputs(tasks, replace(base, fingerprint="x"), Said(other=[same]))


@pytest.mark.timeout(300)
def test_two_machines_with_other_rows_do_not_begin(tiny_model, toy_data, tmp_path) -> None:
    """Two processes as torchrun would start them, each with a data folder of its own."""
    other = tmp_path / "other"
    for kind, name in enumerate(("alpha", "beta")):
        rows = toy_rows(kind + 2, 6)
        write_task(other, name, {"train": rows, "eval": rows, "test": rows})
    for folder in (tmp_path / "0", tmp_path / "1"):
        folder.mkdir()
    (tmp_path / "0" / "data").symlink_to(toy_data)
    (tmp_path / "1" / "data").symlink_to(other)
    run, port = tmp_path / "run", str(free_port())
    started = []
    for rank in ("0", "1"):
        arguments = toy_arguments(tiny_model, Path("data"), run, "alpha,beta")
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": rank,
            "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "treelora_cli", *arguments], env=environment,
                cwd=tmp_path / rank, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "process 1 does not read what process 0 reads" in said[0]
    assert not run.exists()
