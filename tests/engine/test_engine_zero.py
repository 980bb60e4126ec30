"""DeepSpeed's ZeRO 1 and 2 train what one process does; what they cannot serve is refused."""

from __future__ import annotations

import pytest
from processes_support import (
    BY_PASS,
    OTHERS,
    ROUNDING,
    TASKS,
    THREE,
    TRAINED,
    UNSCORED,
    assert_same_steps,
    assert_same_tensors,
    command,
    engine,
    losses,
    needs_deepspeed,
    of_one,
    of_several,
)
from support import run_command, toy_arguments

from treelora_cli.engine.drive import Kind, check_drive
from treelora_cli.engine.world import World
from treelora_cli.errors import UsageError
from treelora_cli.methods import registry


def admitted(kind: Kind) -> list[str]:
    """The methods that an engine does not refuse, with their own settings."""
    found = []
    for name in TRAINED:
        chosen = registry().get(name)
        try:
            check_drive(kind, chosen(chosen.Settings()), World(size=2))
        except UsageError:
            continue
        found.append(name)
    return found


UNDER_ZERO = [("zero2", name) for name in admitted("zero2")]
UNDER_ZERO += [("zero1", name) for name in ("treelora", "olora", "seqlora", "ewc", "seqft")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
@pytest.mark.parametrize(("kind", "name"), UNDER_ZERO)
def test_every_method_under_zero(treelora, tiny_model, toy_data, tmp_path, kind, name) -> None:
    """All that is stored, and every step, are those of one process; of DDP where these differ."""
    if name in BY_PASS:
        known = of_several(tiny_model, toy_data, tmp_path / "known", name, *engine("ddp"))
    else:
        known = of_one(treelora, tiny_model, toy_data, tmp_path / "known", name)
    run = of_several(tiny_model, toy_data, tmp_path / "run", name, *engine(kind))
    assert_same_tensors(known, run, ROUNDING.get(name, OTHERS))
    assert_same_steps(known, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_deepspeed
def test_schedule_clipping_and_decay_under_zero(treelora, tiny_model, toy_data, tmp_path) -> None:
    """The gradient is clipped at a norm that all have, and penalties weigh what they weigh."""
    chosen = []
    for setting in ("grad_clip=0.05", "weight_decay=0.1", "warmup_steps=2", "schedule=cosine"):
        chosen += ["--set", f"optim.{setting}"]
    one = of_one(treelora, tiny_model, toy_data, tmp_path / "one", "olora", *chosen)
    two = of_several(tiny_model, toy_data, tmp_path / "two", "olora", *chosen, *engine("zero2"))
    assert any(penalty > 0 for *_, penalty, _ in losses(one))
    assert_same_tensors(one, two, OTHERS)
    assert_same_steps(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stopped", [False, True], ids=["at once", "resumed"])
@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero1", "zero2"))]
)
def test_moments_go_on(treelora, tiny_model, toy_data, tmp_path, kind, stopped) -> None:
    """With ``optim.carry`` from task to task, and into a task that was stopped."""
    carry = ("--set", "optim.carry=true")
    one = of_one(treelora, tiny_model, toy_data, tmp_path / "one", "treelora", *carry)
    two = tmp_path / "two"
    if stopped:
        chosen = [*UNSCORED, "--method", "treelora", *carry, *engine(kind)]
        fault = {"TREELORA_FAULT": "step:int:9"}
        begun = command(tiny_model, toy_data, two, *chosen, tasks=THREE, **fault)
        assert begun.returncode == 130, begun.stderr
        done = run_command("train-stream", "--run-dir", str(two), *engine(kind), timeout=600)
        assert done.returncode == 0, done.stderr
        assert "resumed beta" in done.stderr
    else:
        of_several(tiny_model, toy_data, two, "treelora", *carry, *engine(kind))
    assert len(list(one.rglob("optimizer.safetensors"))) == 3
    assert_same_tensors(one, two, OTHERS)
    assert_same_steps(one, two)


def test_methods_that_zero_cannot_serve_are_refused(treelora, tiny_model, toy_data, tmp_path):
    run = tmp_path / "run"
    wanted = ["--set", "processes.engine=zero2", "--method"]
    for name in ("gem", "gorp", "osf", "ogd"):
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *wanted, name))
        assert outcome.code == 2
        assert f"{name} needs gradients of a step" in outcome.err
    literal = [*wanted, "treelora", "--set", "method.signature=gradient"]
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *literal))
    assert outcome.code == 2
    assert "treelora needs gradients of a step" in outcome.err
    for name in ("treelora", "seqlora"):
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, TASKS, *wanted, name))
        assert outcome.code == 2
        assert "there is one" in outcome.err
    assert not run.exists()


def test_methods_that_take_gradients_are_not_admitted() -> None:
    refused = set(TRAINED) - set(admitted("zero2"))
    assert refused == {"agem", "gem", "gorp", "ilora", "ogd", "osf", "tasl"}
    assert admitted("zero1") == admitted("zero2")
    assert admitted("ddp") == TRAINED
