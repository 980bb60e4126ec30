"""Several processes score together: the answers of one process, shared out batch by batch."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from support import run_command, toy_arguments, toy_rows, write_task

from treelora_cli.engine.signals import StopFlag
from treelora_cli.errors import Interrupted
from treelora_cli.methods import registry
from treelora_cli.rundir.events import read_events

TASKS = "FOMC,beta"
SMALL = ["--set", "eval.batch_size=3", "--set", "lora.dropout=0", "--epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with labels and one without; an odd number of batches each."""
    folder = tmp_path_factory.mktemp("shared-data")
    for kind, name in enumerate(TASKS.split(",")):
        train, test = toy_rows(kind, 8), toy_rows(kind, 8, 8)
        if name == "FOMC":
            train, test = ([(p, "AB"[a in "Bno"]) for p, a in rows] for rows in (train, test))
        write_task(folder, name, {"train": train, "eval": test, "test": test})
    return folder


def predictions(run: Path) -> dict[str, bytes]:
    files = [*run.glob("tasks/*/predictions/*.jsonl"), *run.glob("predictions/*.jsonl")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def cells(run: Path) -> list[tuple[object, ...]]:
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))["cells"]
    return [(c["after"], c["task"], c["adapter"], c["rows"], c["decoding"]) for c in found]


@pytest.mark.timeout(600)
def test_two_processes_evaluate_as_one_does(treelora, tiny_model, data, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    chosen = [*SMALL, "--method", "per-task", "--set", "eval.when=none"]
    outcome = treelora(*toy_arguments(tiny_model, data, run, TASKS, *chosen))
    assert outcome.code == 0, outcome
    shutil.copytree(run, other)
    asked = ["--adapter", "own", "--scoring", "likelihood", "--json"]
    alone = treelora("eval", str(run), *asked)
    assert alone.code == 0, alone
    done = run_command("eval", str(other), *asked, "--nproc", "2", timeout=300, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"] == json.loads(alone.out)["cells"]
    assert predictions(other) == predictions(run)
    told = [event for event in read_events(other / "events.jsonl") if event["kind"] == "evaluated"]
    assert len(told) == 2  # once, not once a process


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["treelora", "per-task", "hide", "joint", "mbpa", "seqft"])
def test_a_stream_is_scored_by_all(treelora, tiny_model, data, tmp_path, method) -> None:
    """Whatever answers: the last adapter, each task's own, one chosen by the prompt, more."""
    one, two = tmp_path / "one", tmp_path / "two"
    chosen = [*SMALL, "--method", method]
    if method == "hide":  # its penalty depends on the rows of a pass, which processes share out
        chosen += ["--set", "optim.lr=1e-9"]
    outcome = treelora(*toy_arguments(tiny_model, data, one, TASKS, *chosen))
    assert outcome.code == 0, outcome
    arguments = toy_arguments(tiny_model, data, two, TASKS, *chosen, "--nproc", "2")
    done = run_command(*arguments, timeout=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert cells(two) == cells(one)
    # Weights agree to rounding, and so do nearly all greedy answers; the bytes of most files.
    mine, theirs = predictions(one), predictions(two)
    assert mine.keys() == theirs.keys()
    assert sum(mine[name] == theirs[name] for name in mine) > len(mine) / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_are_routed_once_for_all(treelora, tiny_model, data, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    chosen = [*SMALL, "--method", "treelora", "--set", "eval.when=none"]
    outcome = treelora(*toy_arguments(tiny_model, data, run, TASKS, *chosen))
    assert outcome.code == 0, outcome
    shutil.copytree(run, other)
    asked = ["--adapter", "route", "--history", "--json"]
    alone = treelora("eval", str(run), *asked)
    assert alone.code == 0, alone
    done = run_command("eval", str(other), *asked, "--nproc", "2", timeout=300, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    mine, theirs = json.loads(alone.out), json.loads(done.stdout)
    assert theirs["cells"] == mine["cells"]
    assert theirs["routing"]["per_task"] == mine["routing"]["per_task"]
    assert predictions(other) == predictions(run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_evaluation_goes_on(treelora, tiny_model, data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, data, run, TASKS, *SMALL, "--method", "seqlora")
    environment = {"OMP_NUM_THREADS": "1", "TREELORA_FAULT": "eval.batch:int:3"}
    stopped = run_command(*arguments, "--nproc", "2", timeout=300, **environment)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped while evaluating" in stopped.stderr
    assert f"treelora train-stream --run-dir {run} --nproc 2" in stopped.stderr
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    done = run_command(*arguments, "--nproc", "2", timeout=300, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_a_signal_to_one_process_stops_all() -> None:
    with StopFlag(agree=lambda mine: max(mine, signal.SIGTERM)) as stop:
        assert stop.signum is None
        with pytest.raises(Interrupted, match="all of us") as stopped:
            stop.raise_if_set("all of us")
    assert stopped.value.signum == signal.SIGTERM


def test_every_way_to_answer_is_tried() -> None:
    tried = {"treelora", "per-task", "hide", "joint", "mbpa", "seqft"}
    modes = {name: registry().get(name) for name in tried}
    assert {modes[name].mode for name in tried} == {
        registry().get(name).mode for name in registry().names()
    }
