"""No step of our own reads a number from the device before it is two steps old."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import treelora_cli
from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.training import LAG, TaskTrainer
from treelora_cli.errors import DivergedError
from treelora_cli.methods.base import Method, StreamContext, TaskContext, build_method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example
from treelora_cli.models.readback import Readback
from treelora_cli.recipe import ModelSection, OptimSection, build_recipe

PACKAGE = str(Path(treelora_cli.__file__).parent)


class Watch(TorchDispatchMode):
    """Notes who asks for a tensor's value (item, float, bool); torch and transformers may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            caller = next(f for f in reversed(frames) if f.filename != __file__)
            if caller.filename.startswith(PACKAGE):
                self.asked.append(f"{caller.filename}:{caller.lineno} {caller.name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    return AdaptedModel(backbone, build_recipe({"lora": {"rank": 4}}, "r").lora, 0)


def begin(model: AdaptedModel, method: Method, index: int, steps: int) -> TaskTrainer:
    examples = [Example(tuple(range(10 + n, 30 + 2 * n)), 15, False) for n in range(8)]
    optim = OptimSection(lr=1e-2, batch_size=4, micro_batch_tokens=100, epochs=steps)
    plan = BatchPlan(8, 4, -(-steps // 2), index)
    context = TaskContext(index, f"task{index}", plan.steps, 2, index, 2)
    method.begin_task(context)
    trainer = TaskTrainer(model, method, context, Forwards(examples, plan, optim, 0), optim)
    model.peft.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "seqlora"},
        {"name": "treelora"},
        {"name": "treelora", "signature": "lora_delta", "target": "leaf"},
        {"name": "treelora", "signature": "gradient"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
@pytest.mark.parametrize("scope", ["model", "block"])
def test_no_step_waits(
    model: AdaptedModel,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    scope: str,
) -> None:
    recipe = build_recipe({"method": settings, "bandit": {"scope": scope}}, "r")
    method = build_method(recipe)
    method.start(StreamContext(0, recipe.bandit, recipe.tree), model)
    for index in range(3):
        trainer = begin(model, method, index, 2)
        trainer.advance()
        trainer.drain()
        method.end_task(trainer.task)
    trainer = begin(model, method, 3, 8)
    read, to_list = Readback.read, torch.Tensor.tolist
    inside: list[int] = []
    lists: list[str] = []

    def reading(self: Readback) -> list[float]:
        inside.append(1)
        try:
            return read(self)
        finally:
            inside.pop()

    def listing(self: torch.Tensor) -> list[float]:
        caller = traceback.extract_stack()[-2]
        if not inside and not caller.filename.endswith("batches.py"):  # the order of rows: host
            lists.append(f"{caller.filename}:{caller.lineno} {caller.name}")
        return to_list(self)

    monkeypatch.setattr(Readback, "read", reading)
    monkeypatch.setattr(torch.Tensor, "tolist", listing)
    with Watch() as watch:
        results = [trainer.advance() for _ in range(8)]
    assert not watch.asked
    assert not lists
    assert [len(found) for found in results] == [0] * LAG + [1] * (8 - LAG)
    assert [result.step for result in trainer.drain()] == [6, 7]


def test_the_watch_would_notice(model: AdaptedModel) -> None:
    method = build_method(build_recipe({"method": {"name": "seqlora"}}, "r"))
    trainer = begin(model, method, 0, 2)
    with Watch() as watch:
        trainer._check_finite(0, torch.tensor([1.0, 2.0]))
    assert watch.asked


def test_divergence_is_found_late_but_before_anything_is_stored(model: AdaptedModel) -> None:
    method = build_method(build_recipe({"method": {"name": "seqlora"}}, "r"))
    trainer = begin(model, method, 0, 8)
    trainer.advance()
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)
    trainer.advance()
    trainer.advance()
    with pytest.raises(RuntimeError, match="in flight"):
        trainer.checkpoint()
    with pytest.raises(DivergedError, match="loss is nan at step 2 of 8"):
        trainer.drain()


def test_results_are_those_of_the_steps_they_name(model: AdaptedModel) -> None:
    """The same task, once read late and once drained at every step."""
    start = model.snapshot()
    late: list[tuple[int, float, int]] = []
    early: list[tuple[int, float, int]] = []
    for found in (late, early):
        model.restore(start)
        method = build_method(build_recipe({"method": {"name": "seqlora"}}, "r"))
        trainer = begin(model, method, 0, 8)
        for _ in range(8):
            results = trainer.advance()
            if found is early:
                results += trainer.drain()
                assert [result.step for result in results] == [trainer.step - 1]
            found += [(result.step, result.loss, result.tokens) for result in results]
        found += [(result.step, result.loss, result.tokens) for result in trainer.drain()]
    assert late == early
    assert [step for step, _, _ in late] == list(range(8))
    assert len({loss for _, loss, _ in late}) == 8
