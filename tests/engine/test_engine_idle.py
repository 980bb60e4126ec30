"""A process without rows of its own sees as many passes as the others and adds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treelora_cli.engine import training
from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.drive import PlainDrive
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.training import TaskTrainer
from treelora_cli.engine.world import World
from treelora_cli.methods.base import Method, StepContext, StreamContext, TaskContext, build_method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example
from treelora_cli.recipe import ModelSection, OptimSection, build_recipe


@dataclass(frozen=True)
class Apart(World):
    """One process of three whose words reach nobody."""

    def sum(self, values: Tensor) -> Tensor:
        return values


def last_step(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Method, float]:
    """Train two tasks on two rows a step; return the method and the last step's gradient."""
    recipe = build_recipe(
        {"method": {"name": "treelora-official", "reg": 0.5}, "lora": {"targets": ["q_proj"]}}, "r"
    )
    monkeypatch.setattr(
        training, "make_drive", lambda kind, model, method, optim, world: PlainDrive(
            model, optim, method.rate
        ),
    )  # fmt: skip
    model = AdaptedModel(
        load_backbone(ModelSection(name=str(folder), device="cpu")), recipe.lora, 0
    )
    method = build_method(recipe)
    method.start(StreamContext(1, recipe.bandit, recipe.tree, recipe.lora), model)
    examples = [Example(tuple(range(10 + n, 30 + 2 * n)), 15, False) for n in range(4)]
    optim = OptimSection(lr=1e-3, batch_size=2, grad_clip=0, epochs=3)
    found: list[float] = []

    def keep(step: StepContext) -> None:
        found.append(max(float(p.grad.abs().max()) for p in model.parameters()))

    monkeypatch.setattr(method, "after_backward", keep)
    for index in range(2):
        plan = BatchPlan(4, 2, 3, index)
        forwards = Forwards(examples, plan, optim, 0)
        rounds = forwards.per_epoch()
        task = TaskContext(index, f"task{index}", plan.steps, 2, index, rounds)
        method.begin_task(task)
        world = Apart(rank, 3)
        TaskTrainer(model, method, task, forwards, optim, world).run(
            lambda result: None, lambda: None
        )
        method.end_task(task)
    return method, found[-1]


def test_draws_are_alike_where_a_process_has_no_rows(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, busy = last_step(tiny_model, 0, monkeypatch)
    third, idle = last_step(tiny_model, 2, monkeypatch)
    assert busy > 0
    assert idle == 0
    states = [one.state() for one in (first, third)]
    assert states[0][1] == states[1][1]
    assert states[0][0].keys() == states[1][0].keys()
    counted = [key for key, value in states[0][0].items() if not value.is_floating_point()]
    assert counted
    for key in counted:
        assert torch.equal(states[0][0][key], states[1][0][key]), key
