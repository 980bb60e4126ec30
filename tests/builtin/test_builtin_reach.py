"""The built-in default is real enough: it can be learned, and it can be forgotten.

Minutes long: trains the whole quickstart stream with the real command, twice.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def report(run: Path, method: str) -> dict[str, object]:
    done = run_command("train-stream", "--method", method, "--run-dir", str(run), timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(run_command("report", str(run), "--json").stdout)


def test_every_task_can_be_learned(tmp_path: Path) -> None:
    document = report(tmp_path / "per-task", "per-task")
    assert document["synthetic"]
    assert len(document["tasks"]) == 8
    for task in document["tasks"]:
        assert task["synthetic"], task["name"]
        if task["metric"] == "accuracy":
            assert task["own"] >= task["chance"] + 0.25, task
            assert task["own"] >= task["zero_shot"] + 0.25, task
        else:
            assert task["own"] >= task["zero_shot"] + 0.10, task


def test_plain_sequential_training_forgets(tmp_path: Path) -> None:
    assert report(tmp_path / "seqlora", "seqlora")["bwt"] >= 0.10
