"""Several processes train the same stream: the numbers of one process, whoever begins and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes_support import (
    BY_PASS,
    OTHERS,
    ROUNDING,
    SAME,
    TASKS,
    TRAINED,
    assert_same,
    assert_same_steps,
    assert_same_tensors,
    command,
    engine,
    environment,
    needs_deepspeed,
    of_one,
    of_several,
    train_alone,
)
from support import run_command, toy_arguments

from treelora_cli.rundir.events import read_events


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model: Path, toy_data: Path) -> dict[str, Path]:
    """One process, one run per method."""
    return {
        method: train_alone(tmp_path_factory.mktemp(method), tiny_model, toy_data, method)
        for method in ("treelora", "olora")
    }


@pytest.mark.timeout(900)
def test_two_processes_train_what_one_does(alone, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    done = command(tiny_model, toy_data, run, "--method", "treelora", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run)  # once, not once a process
    assert_same(run, alone["treelora"])
    said = [event["kind"] for event in read_events(run / "events.jsonl")]
    assert said.count("run_started") == 1


@pytest.mark.timeout(900)
def test_the_first_speaks_for_all_when_a_process_dies(tiny_model, toy_data, tmp_path) -> None:
    """The others end, with a clear line and nothing half-written; one process goes on."""
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS, *SAME)
    started = subprocess.Popen(
        [sys.executable, "-m", "treelora_cli", *arguments, "--nproc", "2", "--epochs", "2000"],
        env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    second = wait_for_rank(started.pid, 1, run)
    os.kill(second, signal.SIGKILL)
    _, error = started.communicate(timeout=400)
    assert started.returncode == 6, error
    assert "another process of the group has ended" in error
    assert "process 1 was ended by signal 9" in error
    assert "Traceback" not in error
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_parent_takes_its_processes_along(tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS, *SAME)
    started = subprocess.Popen(
        [sys.executable, "-m", "treelora_cli", *arguments, "--nproc", "2", "--epochs", "2000"],
        env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ranks = [wait_for_rank(started.pid, rank, run) for rank in (0, 1)]
    started.kill()
    started.wait()
    deadline = time.monotonic() + 240
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def wait_for_rank(parent: int, rank: int, run: Path) -> int:
    """Return the process of a rank, once training has begun."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if not (run / "events.jsonl").exists() or "step" not in (run / "events.jsonl").read_text():
            continue
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                status = (folder / "status").read_text()
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError("no such process")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("olora", engine("ddp"), engine("ddp")),
        ("olora", [], engine("ddp")),
        ("olora", engine("ddp"), []),
        pytest.param("olora", engine("zero2"), engine("zero2"), marks=needs_deepspeed),
        pytest.param("olora", engine("zero1"), engine("ddp", 3), marks=needs_deepspeed),
        pytest.param("olora", [], engine("zero2"), marks=needs_deepspeed),
        pytest.param("treelora", engine("zero1"), engine("zero1"), marks=needs_deepspeed),
        pytest.param("treelora", engine("zero2"), engine("zero2", 3), marks=needs_deepspeed),
        pytest.param("treelora", [], engine("zero2"), marks=needs_deepspeed),
        pytest.param("treelora", engine("zero2"), engine("ddp", 1), marks=needs_deepspeed),
    ],
    ids=lambda some: some if isinstance(some, str) else " ".join(some) or "one process",
)
def test_whoever_goes_on(alone, tiny_model, toy_data, tmp_path, method, before, after) -> None:
    """Stopped in the middle of the second task, and resumed by others."""
    run = tmp_path / "run"
    chosen = ["--method", method, *before]
    stopped = command(tiny_model, toy_data, run, *chosen, TREELORA_FAULT="step:int:9")
    assert stopped.returncode == 130, stopped.stderr
    more = ["train-stream", "--run-dir", str(run), *after]
    done = run_command(*more, timeout=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "resumed beta" in done.stderr
    assert_same(run, alone[method])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in BY_PASS])
def test_every_method_in_two_processes(treelora, tiny_model, toy_data, tmp_path, name) -> None:
    """Gradients are reduced before a method sees them; its own are summed over the processes."""
    one = of_one(treelora, tiny_model, toy_data, tmp_path / "one", name)
    two = of_several(tiny_model, toy_data, tmp_path / "two", name, *engine("ddp"))
    assert_same_tensors(one, two, ROUNDING.get(name, OTHERS))
    assert_same_steps(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lwf", "l2p", "dualprompt"])
@pytest.mark.parametrize(
    "kind",
    ["ddp", "fsdp2", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero1", "zero2"))],
)
def test_a_process_without_rows(treelora, tiny_model, toy_data, tmp_path, kind, name) -> None:
    """It adds no penalty of its own, sums with the others, and meets parameters in their order."""
    small = ["--set", "optim.batch_size=2"]
    if name != "lwf":  # at 300 times the learning rate rounding grows too fast to compare
        small += ["--set", "method.rate=10"]
    one = of_one(treelora, tiny_model, toy_data, tmp_path / "one", name, *small)
    three = of_several(tiny_model, toy_data, tmp_path / "three", name, *small, *engine(kind, 3))
    assert_same_tensors(one, three, ROUNDING.get(name, OTHERS))
    assert_same_steps(one, three)


def test_tasks_that_arrive_need_one_process(treelora, tiny_model, toy_data, tmp_path) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "-", "--nproc", "2")
    outcome = treelora(*arguments)
    assert outcome.code == 2
    assert "several processes" in outcome.err
