"""DeepSpeed's ZeRO 1 and 2 train what one process does; what they cannot serve is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
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
from zero_support import OneProcessDeepSpeed

from treelora_cli.engine import drive_zero
from treelora_cli.engine.drive import Drive, Kind, PlainDrive, check_drive
from treelora_cli.engine.drive_zero import ZeroDrive, import_deepspeed
from treelora_cli.engine.world import World
from treelora_cli.errors import EnvironmentProblem, UsageError
from treelora_cli.methods import registry
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import LoraSection, ModelSection, OptimSection


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
    """Gradients of two passes add up, and are clipped by the norm of all processes' sum."""
    chosen = ["--set", "optim.micro_batch_size=1"]
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


OPTIM = OptimSection(grad_clip=0.5, weight_decay=0.1)


@pytest.fixture
def pair(tiny_model, monkeypatch) -> tuple[AdaptedModel, AdaptedModel]:
    """Two models alike; DeepSpeed stands in for itself."""
    stand_in = OneProcessDeepSpeed()
    monkeypatch.setattr(drive_zero, "import_deepspeed", lambda: stand_in)
    section = ModelSection(name=str(tiny_model), device="cpu")
    one, two = (AdaptedModel(load_backbone(section), LoraSection(), 0) for _ in range(2))
    return one, two


def under_zero(adapted: AdaptedModel) -> ZeroDrive:
    return ZeroDrive(adapted, OPTIM, rate, World(size=2), stage=2)


def rate(key: str) -> float:
    return 0.5 if ".lora_A." in key else 2.0


def take(drive: Drive, adapted: AdaptedModel, lr: float) -> float:
    """A step of two passes: the first depends on all parameters, the second on one of them."""
    parameters = adapted.parameters()
    drive.begin(lr)
    drive.backward(sum((p - 0.3).square().sum() for p in parameters), last=False)
    drive.backward((parameters[0] + 0.7).square().sum(), last=True)
    return float(drive.step())


def test_a_step_under_zero_is_a_step(pair) -> None:
    """Two passes, a method that writes, a resume: weights, norm and moments as without it."""
    plain, shared = pair
    drives = [PlainDrive(plain, OPTIM, rate), under_zero(shared)]
    for number, lr in enumerate((0.1, 0.05, 0.2, 0.01)):
        if number == 2:
            stored = drives[1].tensors()
            drives[1].close()
            shared.reset()
            drives[1] = under_zero(shared)
            shared.restore(plain.snapshot())  # as a resume does, when DeepSpeed has its copy
            drives[1].load(stored)
        norms = [take(drive, one, lr) for drive, one in zip(drives, pair, strict=True)]
        assert norms[0] == pytest.approx(norms[1])
        for drive, one in zip(drives, pair, strict=True):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.mul_(0.9)
            drive.written()
        for mine, theirs in zip(plain.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    one, two = (drive.tensors() for drive in drives)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=1e-6, msg=key)


def test_what_zero_is_asked_for(pair) -> None:
    """Each process's loss counts as often as there are processes, whose gradients are averaged."""
    drive = under_zero(pair[0])
    assert drive.times == 2
    asked = drive_zero.import_deepspeed().config
    assert asked["zero_optimization"]["stage"] == 2
    # DeepSpeed makes a buffer of that size; what it does unasked is 2 GB.
    assert asked["zero_optimization"]["reduce_bucket_size"] == pair[0].trainable_count()


def test_a_deepspeed_that_is_missing_or_too_old(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EnvironmentProblem, match="need the package deepspeed"):
        import_deepspeed()
    old = SimpleNamespace(DeepSpeedEngine=object, __version__="0.19.0")
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(EnvironmentProblem, match=r"deepspeed 0\.19\.0 is too old"):
        import_deepspeed()


@pytest.mark.parametrize(("name", "times"), [("treelora", 6), ("seqlora", 0)])
def test_what_a_method_writes_is_taken_up(
    treelora, monkeypatch, tiny_model, toy_data, tmp_path, name, times
) -> None:
    """After every step of a method that writes into the weights, and of no other one."""
    called = []
    monkeypatch.setattr(PlainDrive, "written", lambda drive: called.append(drive))
    chosen = [*UNSCORED, "--method", name]
    outcome = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", *chosen))
    assert outcome.code == 0, outcome
    assert len(called) == times


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
