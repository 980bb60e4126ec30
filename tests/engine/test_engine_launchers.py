"""Whoever starts the processes: torchrun and deepspeed, on one machine and as on several."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes_support import SAME, TASKS, assert_same, environment, needs_deepspeed, train_alone
from support import free_port, toy_arguments

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
ZERO = ("--set", "processes.engine=zero2")
TOGETHER = 300.0


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model: Path, toy_data: Path) -> Path:
    """What one process trains."""
    return train_alone(tmp_path_factory.mktemp("alone"), tiny_model, toy_data, "treelora")


def arguments(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    return toy_arguments(model, data, run, TASKS, *SAME, "--method", "treelora", *more)


def launch(*commands: list[str], seconds: float = TOGETHER) -> list[tuple[int, str, str]]:
    """Run launchers at the same time, as several machines would; return codes and what was said."""
    started = [
        subprocess.Popen(
            each, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for each in commands
    ]
    deadline = time.monotonic() + seconds
    found = []
    try:
        for one in started:
            out, error = one.communicate(timeout=deadline - time.monotonic())
            found.append((one.returncode, out, error))
    finally:
        for one in started:
            one.terminate()  # which ends its processes too
    return found


def by_torchrun(port: int, node: int, *arguments: str) -> list[str]:
    """One machine of two, with one process."""
    return [
        *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
        "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "treelora_cli", *arguments,
    ]  # fmt: skip


def by_deepspeed(hosts: Path, port: int, node: int, *arguments: str) -> list[str]:
    """One machine of a host file, where no ssh leads from one to the other."""
    return [
        *DEEPSPEED, "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node),
        "--master_addr", "127.0.0.1", "--master_port", str(port), "--module", "treelora_cli",
        *arguments,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun(alone, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    own = arguments(tiny_model, toy_data, run)
    start = ["--standalone", "--nproc-per-node", "2", "-m", "treelora_cli", *own]
    ((code, out, error),) = launch([*TORCHRUN, *start])
    assert code == 0, error
    assert out.strip() == str(run)
    assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
def test_the_launcher_of_deepspeed(alone, tiny_model, toy_data, tmp_path) -> None:
    """It gives every process an argument of its own before the command."""
    run = tmp_path / "run"
    own = arguments(tiny_model, toy_data, run, *ZERO)
    port = ("--master_port", str(free_port()))
    start = [*DEEPSPEED, "--num_gpus", "2", *port, "--module", "treelora_cli", *own]
    ((code, _, error),) = launch(start)
    assert code == 0, error
    assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_by_torchrun(alone, tiny_model, toy_data, tmp_path) -> None:
    """Each has a process 0 of its own; the run directory is shared."""
    run, port = tmp_path / "run", free_port()
    own = arguments(tiny_model, toy_data, run)
    first, second = launch(*(by_torchrun(port, node, *own) for node in (0, 1)))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].strip() == str(run)
    assert second[1].strip() == ""
    assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
def test_two_machines_of_a_host_file(alone, tiny_model, toy_data, tmp_path) -> None:
    """Started on each of them: without ssh, deepspeed only works out the ranks."""
    run, port = tmp_path / "run", free_port()
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    own = arguments(tiny_model, toy_data, run, *ZERO)
    found = launch(*(by_deepspeed(hosts, port, node, *own) for node in (0, 1)))
    assert [code for code, *_ in found] == [0, 0], found
    assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "other",
    [["--seed", "7"], ["--tasks", "alpha,gamma"], ["--set", "optim.lr=2e-3"], ["--epochs", "3"]],
    ids=" ".join,
)
def test_machines_with_other_commands_do_not_begin(tiny_model, toy_data, tmp_path, other) -> None:
    run, port = tmp_path / "run", free_port()
    own = arguments(tiny_model, toy_data, run)
    found = launch(by_torchrun(port, 0, *own), by_torchrun(port, 1, *own, *other))
    said = "".join(error for *_, error in found)
    assert all(code for code, *_ in found), said
    assert "other settings" in said
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
@pytest.mark.parametrize("count", ["1", "3"])
def test_nproc_beside_a_launcher_must_fit(tiny_model, toy_data, tmp_path, count) -> None:
    """A launcher has started the processes already; ``--nproc`` then only says how many."""
    run = tmp_path / "run"
    own = arguments(tiny_model, toy_data, run, "--nproc", count)
    port = ("--master_port", str(free_port()))
    ((code, _, error),) = launch(
        [*DEEPSPEED, "--num_gpus", "2", *port, "--module", "treelora_cli", *own]
    )
    assert code != 0
    assert f"{count} processes were asked for, but the launcher started 2" in error
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_takes_nproc_for_its_own(tiny_model, toy_data, tmp_path) -> None:
    """Wherever it stands, torchrun reads it as a beginning of two of its own options."""
    run = tmp_path / "run"
    own = arguments(tiny_model, toy_data, run, "--nproc", "2")
    start = ["--standalone", "--nproc-per-node", "2", "-m", "treelora_cli", *own]
    ((code, _, error),) = launch([*TORCHRUN, *start])
    assert code != 0
    assert "ambiguous option: --nproc" in error
    assert not run.exists()
