"""A base shared out over processes trains and answers as a whole one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, free_port, make_checkpoint, make_t5, run_command, toy_arguments

from treelora_cli.engine.building import parts_of
from treelora_cli.engine.world import World
from treelora_cli.errors import EnvironmentProblem
from treelora_cli.methods import registry

TASKS = "alpha,beta"
SAME = ["--set", "lora.dropout=0"]
SHARDED = ["--nproc", "2", "--set", "processes.engine=fsdp2"]
OLORA = ["--method", "olora"]
TRAINS_THE_BASE = {"seqft", "gorp", "osf"}
TRAINED = [name for name in registry().names() if name not in TRAINS_THE_BASE]
# Under DDP and FSDP2 the same rows are read together in the same order.
TOLERANCE = 1e-6


def command(
    model: Path, data: Path, run: Path, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    arguments = toy_arguments(model, data, run, TASKS, *SAME, *more)
    return run_command(*arguments, timeout=600, OMP_NUM_THREADS="1", **environment)


def assert_same(run: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """The stored tensors of two runs agree, and every answer that was given."""
    files = [file.relative_to(run) for file in run.glob("tasks/*/adapter/*.safetensors")]
    files += [file.relative_to(run) for file in run.glob("tasks/*/weights.safetensors")]
    assert files
    for file in files:
        mine, theirs = load_file(run / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(
                value, theirs[key], rtol=0, atol=tolerance, msg=f"{file} {key}"
            )
    answers = [file.relative_to(run) for file in run.rglob("*.jsonl") if "predictions" in str(file)]
    assert answers
    for file in answers:
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.timeout(600)
def test_a_shared_out_base_trains_what_a_whole_one_does(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    """Against one process, by a method with a penalty, which every process adds."""
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = treelora(*toy_arguments(tiny_model, toy_data, one, TASKS, *SAME, *OLORA))
    assert outcome.code == 0, outcome
    done = command(tiny_model, toy_data, two, *OLORA, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(two)
    assert_same(one, two)
    scores = [json.loads((run / "scores.json").read_text(encoding="utf-8")) for run in (one, two)]
    for mine, theirs in zip(scores[0]["cells"], scores[1]["cells"], strict=True):
        assert {**mine, "adapter_hash": ""} == {**theirs, "adapter_hash": ""}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_on_a_shared_out_base(tiny_model, toy_data, tmp_path, name) -> None:
    """Penalties, gradients, conditions and routing read what they read under DDP."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    done = command(tiny_model, toy_data, whole, "--method", name, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    done = command(tiny_model, toy_data, shared, "--method", name, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert_same(whole, shared)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "more",
    [
        ["--set", "optim.gradient_checkpointing=true"],
        ["--set", "eval.scoring=likelihood"],
        ["--set", "optim.micro_batch_size=1"],
        ["--set", "optim.carry=true"],
        ["--set", "method.signature=query"],
        ["--set", "method.signature=gradient"],
        ["--nproc", "3", "--set", "optim.batch_size=4"],
    ],
    ids=lambda more: more[-1],
)
def test_settings_on_a_shared_out_base(treelora, tiny_model, toy_data, tmp_path, more) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = more[2:] if more[0] == "--nproc" else more
    outcome = treelora(*toy_arguments(tiny_model, toy_data, one, TASKS, *SAME, *alone))
    assert outcome.code == 0, outcome
    done = command(tiny_model, toy_data, two, *SHARDED, *more)
    assert done.returncode == 0, done.stderr
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(SHARDED, []), ([], SHARDED)])
def test_another_engine_goes_on(
    treelora, tiny_model, toy_data, tmp_path, before: list[str], after: list[str]
) -> None:
    """Stopped in the second task; resumed where the base is shared out, or no longer is."""
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = treelora(*toy_arguments(tiny_model, toy_data, one, TASKS, *SAME))
    assert outcome.code == 0, outcome
    stopped = command(tiny_model, toy_data, two, *before, TREELORA_FAULT="step:int:9")
    assert stopped.returncode == 130, stopped.stderr
    after = after or ["--set", "processes.engine=ddp"]
    done = command(tiny_model, toy_data, two, *after)
    assert done.returncode == 0, done.stderr
    assert "resumed beta" in done.stderr
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["t5", "tied", "gpt2", "gemma2", "mixtral", "bfloat16"])
def test_other_architectures_are_shared_out(toy_data, tmp_path, kind) -> None:
    """Against DDP: GPT-2 and T5 drop out inside the base, differently in each process."""
    model = tmp_path / "model"
    if kind == "t5":
        make_t5(model)
    elif kind == "tied":
        make_checkpoint(model, "llama", tie_word_embeddings=True)
    else:
        make_checkpoint(model, "llama" if kind == "bfloat16" else kind)
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--set", "eval.scoring=likelihood", "--set", "lora.targets=all-linear"]
    if kind == "bfloat16":
        more += ["--set", "model.dtype=bfloat16"]
    done = command(model, toy_data, one, *SHARDED[:2], *more)
    assert done.returncode == 0, done.stderr
    done = command(model, toy_data, two, *SHARDED, *more)
    assert done.returncode == 0, done.stderr
    assert_same(one, two)
    done = run_command(
        "eval", str(two), "--adapter", "own", *SHARDED[:2], timeout=300, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr


COUNT = """
import sys
from treelora_cli.engine.building import build_model
from treelora_cli.engine.world import joined
from treelora_cli.methods.base import build_method
from treelora_cli.recipe import build_recipe

recipe = build_recipe({"model": {"name": sys.argv[1]}, "processes": {"engine": "fsdp2"}}, "here")
with joined() as world:
    adapted = build_model(recipe, build_method(recipe), world.under("fsdp2"))
    held = whole = adapter = 0
    for name, parameter in adapted.peft.named_parameters():
        if "lora_" in name:
            adapter += type(parameter).__name__ == "DTensor"
            continue
        whole += parameter.numel()
        held += parameter.to_local().numel()
    print(held / whole, adapter, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_process_holds_its_part(tiny_model) -> None:
    """Half of the base with two processes; not one matrix of the adapter is taken apart."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--no-python", sys.executable, "-c", COUNT, str(tiny_model)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines] == ["0", "0"]
    assert [float(line[0]) for line in lines] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_machine_has_a_base_of_its_own(treelora, tiny_model, toy_data, tmp_path) -> None:
    """Two launchers of two processes each, as on two machines."""
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = treelora(*toy_arguments(tiny_model, toy_data, one, TASKS, *SAME))
    assert outcome.code == 0, outcome
    arguments = toy_arguments(tiny_model, toy_data, two, TASKS, *SAME, *SHARDED[2:])
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", node,
             "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port,
             "-m", "treelora_cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[0][0].strip() == str(two)
    assert said[1][0].strip() == ""
    assert_same(one, two)


@pytest.mark.parametrize(
    ("places", "parts"), [([0, 1], 2), ([0, 0], 1), ([0, 1, 0, 1], 2), ([0, 1, 2], 3)]
)
def test_processes_of_a_machine_share_a_base(places: list[int], parts: int) -> None:
    assert parts_of(Placed(size=len(places), places=places)) == parts


@pytest.mark.parametrize("places", [[0, 1, 0], [0, 1, 1, 0], [1, 0]])
def test_machines_must_be_alike(places: list[int]) -> None:
    with pytest.raises(EnvironmentProblem, match="as many processes on every machine"):
        parts_of(Placed(size=len(places), places=places))


@dataclass(frozen=True)
class Placed(World):
    """A world that knows where its processes are."""

    places: list[int] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return self.places


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", sorted(TRAINS_THE_BASE))
def test_methods_that_train_the_base_are_refused(tiny_model, toy_data, tmp_path, method) -> None:
    run = tmp_path / "run"
    done = command(tiny_model, toy_data, run, "--method", method, *SHARDED)
    assert done.returncode == 2, done.stderr
    assert "trains weights of it" in done.stderr
    assert done.stderr.count("error: ") == 1  # not once a process
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_one_process_has_nobody_to_share_with(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *SHARDED[2:]))
    assert outcome.code == 2
    assert "shares the base out among processes; there is one" in outcome.err
    assert not run.exists()
