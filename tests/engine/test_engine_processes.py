"""Several processes train the same stream: the numbers of one process, whoever begins and ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, run_command, toy_arguments

from treelora_cli.methods import registry
from treelora_cli.rundir.events import read_events

TASKS = "alpha,beta"
# Sums over rows come in another order, and nothing else differs: rounding in float32.
TOLERANCE = 1e-6
# What they add depends on which rows a forward pass reads together, and processes share them out.
BY_PASS = {"hide", "treelora-official"}
TRAINED = [
    name for name in registry().names() if registry().get(name).trains and name not in BY_PASS
]
SAME = ["--set", "lora.dropout=0", "--set", "eval.when=last"]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def command(
    model: Path, data: Path, run: Path, *more: str, tasks: str = TASKS, **environment: str
) -> subprocess.CompletedProcess[str]:
    arguments = toy_arguments(model, data, run, tasks, *SAME, *more)
    return run_command(*arguments, timeout=600, OMP_NUM_THREADS="1", **environment)


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.parent.name} {key}": value
        for file in sorted(run.glob("tasks/*/adapter/adapter_model.safetensors"))
        for key, value in load_file(file).items()
    }


def losses(run: Path) -> list[tuple[str, int, float, float, int]]:
    steps = {
        (event["task"], event["step"]): event
        for event in read_events(run / "events.jsonl")
        if event["kind"] == "step"
    }
    return [
        (task, step, event["loss"], event["penalty"] or 0.0, event["tokens"])
        for (task, step), event in sorted(steps.items())
    ]


def assert_same(run: Path, other: Path) -> None:
    mine, theirs = adapters(run), adapters(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=TOLERANCE, msg=key)
    for one, two in zip(losses(run), losses(other), strict=True):
        assert one[:2] == two[:2]
        assert one[2:] == pytest.approx(two[2:], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model: Path, toy_data: Path) -> dict[str, Path]:
    """One process, one run per method."""
    runs = {}
    for method in ("treelora", "olora"):
        runs[method] = tmp_path_factory.mktemp(method) / "run"
        done = command(tiny_model, toy_data, runs[method], "--method", method)
        assert done.returncode == 0, done.stderr
    return runs


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "treelora_cli", *arguments, "--nproc", "2", "--epochs", "2000"],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "treelora_cli", *arguments, "--nproc", "2", "--epochs", "2000"],
        env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
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
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero_trains_what_one_process_does(alone, tiny_model, toy_data, tmp_path, engine) -> None:
    run = tmp_path / "run"
    chosen = ["--method", "olora", "--set", f"processes.engine={engine}", "--nproc", "2"]
    done = command(tiny_model, toy_data, run, *chosen)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run)
    assert any(penalty > 0 for *_, penalty, _ in losses(run))
    assert_same(run, alone["olora"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--nproc", "2"], ["--nproc", "2"]),
        ([], ["--nproc", "2"]),
        (["--nproc", "2"], []),
        pytest.param(
            ["--nproc", "2", "--set", "processes.engine=zero2"],
            ["--nproc", "2", "--set", "processes.engine=zero2"],
            marks=needs_deepspeed,
        ),
        pytest.param(
            ["--nproc", "2", "--set", "processes.engine=zero1"],
            ["--nproc", "3", "--set", "processes.engine=ddp"],
            marks=needs_deepspeed,
        ),
        pytest.param(
            [], ["--nproc", "2", "--set", "processes.engine=zero2"], marks=needs_deepspeed
        ),
    ],
    ids=lambda some: " ".join(some) or "one process",
)
def test_whoever_goes_on(alone, tiny_model, toy_data, tmp_path, before, after) -> None:
    """Stopped in the middle of the second task, and resumed by others."""
    run = tmp_path / "run"
    chosen = ["--method", "olora", *before]
    stopped = command(tiny_model, toy_data, run, *chosen, TREELORA_FAULT="step:int:9")
    assert stopped.returncode == 130, stopped.stderr
    more = ["train-stream", "--run-dir", str(run), *after]
    done = run_command(*more, timeout=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "resumed beta" in done.stderr
    assert_same(run, alone["olora"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [name for name in registry().names() if registry().get(name).trains]
)
def test_every_method_in_two_processes(treelora, tiny_model, toy_data, tmp_path, name) -> None:
    """Gradients are reduced before a method sees them, and its own are summed over the processes.

    Directions made of gradients (ogd, inflora) carry rounding further than a step does.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    chosen = ["--method", name, "--set", "eval.when=none", "--set", "route.prompts=0"]
    outcome = treelora(*toy_arguments(tiny_model, toy_data, one, TASKS, *SAME[:2], *chosen))
    assert outcome.code == 0, outcome
    done = command(tiny_model, toy_data, two, *chosen, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    files = [file.relative_to(one) for file in one.glob("tasks/*/adapter/*.safetensors")]
    files += [file.relative_to(one) for file in one.glob("tasks/*/weights.safetensors")]
    assert files
    for file in files:
        mine, theirs = load_file(one / file), load_file(two / file)
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-4, msg=f"{file} {key}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun(alone, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS, *SAME, "--method", "treelora")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "treelora_cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(run, alone["treelora"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
def test_the_launcher_of_deepspeed(alone, tiny_model, toy_data, tmp_path) -> None:
    """It gives every process an argument of its own before the command."""
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS, *SAME, "--method", "olora")
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module",
         "treelora_cli", *arguments, "--set", "processes.engine=zero2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(run, alone["olora"])


def test_methods_that_zero_cannot_serve_are_refused(treelora, tiny_model, toy_data, tmp_path):
    run = tmp_path / "run"
    wanted = ["--set", "processes.engine=zero2", "--method"]
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *wanted, "gem"))
    assert outcome.code == 2
    assert "gem needs gradients of a step" in outcome.err
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *wanted, "treelora"))
    assert outcome.code == 2
    assert "treelora needs weights of a step" in outcome.err
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *wanted, "seqlora"))
    assert outcome.code == 2
    assert "there is one" in outcome.err
    assert not run.exists()


def test_tasks_that_arrive_need_one_process(treelora, tiny_model, toy_data, tmp_path) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "-", "--nproc", "2")
    outcome = treelora(*arguments)
    assert outcome.code == 2
    assert "several processes" in outcome.err
