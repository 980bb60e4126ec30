"""Runs of several processes, and what they stored against what another run stored."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, run_command, toy_arguments

from treelora_cli.methods import registry
from treelora_cli.rundir.events import read_events

TASKS = "alpha,beta"
THREE = "alpha,beta,gamma"
# Sums over rows come in another order, and nothing else differs: rounding in float32.
TOLERANCE = 1e-6
SAME = ["--set", "lora.dropout=0", "--set", "eval.when=last"]
# Neither scores nor features: what is trained and stored is compared.
UNSCORED = ["--set", "lora.dropout=0", "--set", "eval.when=none", "--set", "route.prompts=0"]
TRAINED = [name for name in registry().names() if registry().get(name).trains]
# What it adds depends on which rows a forward pass reads together, and processes share them out.
BY_PASS = {"treelora-official"}
# So does what this one adds, but not where every pass reads one row.
ALONE = {"hide": ("--set", "optim.micro_batch_size=1")}
# What these store carries rounding further than a step does: directions made of gradients or of
# inputs, and parts that learn 300 times as fast as an adapter.
ROUNDING = dict.fromkeys(("ogd", "gorp", "inflora", "l2p", "dualprompt"), 1e-4)
OTHERS = 5e-6
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def environment() -> dict[str, str]:
    """What a launcher is started with."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(
    model: Path, data: Path, run: Path, *more: str, tasks: str = TASKS, **variables: str
) -> subprocess.CompletedProcess[str]:
    arguments = toy_arguments(model, data, run, tasks, *SAME, *more)
    return run_command(*arguments, timeout=600, OMP_NUM_THREADS="1", **variables)


def engine(kind: str, count: int = 2) -> list[str]:
    """Arguments that ask for so many processes under an engine."""
    return ["--nproc", str(count), "--set", f"processes.engine={kind}"]


def of_one(treelora, model: Path, data: Path, run: Path, method: str, *more: str) -> Path:
    """One process, in this one, over three tasks; returns its run directory."""
    chosen = [*UNSCORED, "--method", method, *ALONE.get(method, ()), *more]
    outcome = treelora(*toy_arguments(model, data, run, THREE, *chosen))
    assert outcome.code == 0, outcome
    return run


def of_several(model: Path, data: Path, run: Path, method: str, *more: str) -> Path:
    """Several processes over three tasks; returns their run directory."""
    chosen = [*UNSCORED, "--method", method, *ALONE.get(method, ()), *more]
    done = command(model, data, run, *chosen, tasks=THREE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run)  # once, not once a process
    return run


def train_alone(place: Path, model: Path, data: Path, method: str) -> Path:
    """One process; returns its run directory."""
    run = place / "run"
    done = command(model, data, run, "--method", method)
    assert done.returncode == 0, done.stderr
    return run


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
    """Adapters and every step's loss, penalty and tokens agree."""
    mine, theirs = adapters(run), adapters(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=TOLERANCE, msg=key)
    assert_same_steps(run, other)


def assert_same_steps(run: Path, other: Path) -> None:
    """Every step's loss, penalty and tokens agree."""
    for one, two in zip(losses(run), losses(other), strict=True):
        assert one[:2] == two[:2]
        assert one[2:] == pytest.approx(two[2:], rel=1e-4, abs=1e-5)


def assert_same_tensors(run: Path, other: Path, tolerance: float) -> None:
    """All that is stored in tensors agrees: adapters, weights, memories, trees, moments."""
    files = [file.relative_to(run) for file in sorted(run.rglob("*.safetensors"))]
    assert files
    assert files == [file.relative_to(other) for file in sorted(other.rglob("*.safetensors"))]
    for file in files:
        mine, theirs = load_file(run / file), load_file(other / file)
        assert mine.keys() == theirs.keys(), file
        for key, value in mine.items():
            torch.testing.assert_close(
                value, theirs[key], rtol=0, atol=tolerance, msg=f"{file} {key}"
            )
