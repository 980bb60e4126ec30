"""LwF: its distillation against the formula, its teacher against the weights before the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_support import LORA, finish, live_model, task_rows, weights
from rows_support import meet, move, task

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.training import TaskTrainer
from treelora_cli.methods.base import StepContext
from treelora_cli.methods.lwf import Lwf, distillation
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import IGNORED, Batch, collate
from treelora_cli.models.forward import answer_logits
from treelora_cli.recipe import OptimSection


@pytest.fixture(params=["causal", "t5"])
def either(request, tiny_model: Path, tiny_t5: Path) -> AdaptedModel:
    return live_model(tiny_model if request.param == "causal" else tiny_t5)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def divergence(old: torch.Tensor, new: torch.Tensor, labels: torch.Tensor, T: float) -> float:
    """T^2 sum p_old log(p_old / p_new) over the positions that count."""
    kept = (labels != IGNORED).numpy()
    p = softmax(old.detach().double().numpy()[kept] / T)
    q = softmax(new.detach().double().numpy()[kept] / T)
    return float(T**2 * (p * np.log(p / q)).sum())


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
def test_distillation_and_its_gradient(T: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4, 7, generator=generator) * 3
    new = (torch.randn(4, 7, generator=generator) * 3).requires_grad_()
    labels = torch.tensor([3, IGNORED, 0, 6])
    value = distillation(old, new, labels, T)
    assert float(value) == pytest.approx(divergence(old, new, labels, T), rel=1e-5)
    slope = torch.autograd.grad(value, new)[0]
    expected = T * (torch.softmax(new / T, -1) - torch.softmax(old / T, -1)).detach()
    expected[1] = 0
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
    assert float(distillation(old, old, labels, T)) == pytest.approx(0, abs=1e-5)


def asked(
    method: Lwf, model: AdaptedModel, batch: Batch
) -> tuple[torch.Tensor | None, torch.Tensor]:
    method.before_forward(batch)
    logits = answer_logits(model, batch)
    context = StepContext(0, torch.tensor(1.0), batch=batch, logits=logits)
    return method.penalty(context), logits


def test_the_teacher_is_the_model_before_the_task(either: AdaptedModel) -> None:
    method = meet(Lwf, either, LORA, {"lambda": 3.0, "temperature": 4.0})
    batch = collate(task_rows(either, 7), 0)
    method.begin_task(task(either, 0, []))
    assert asked(method, either, batch)[0] is None
    finish(method, either, 1)
    with torch.no_grad():
        old = answer_logits(either, batch)
    method.begin_task(task(either, 1, []))
    assert float(asked(method, either, batch)[0]) == pytest.approx(0, abs=1e-5)
    move(either, 5, 0.2)
    before = weights(either)
    value, new = asked(method, either, batch)
    assert torch.equal(weights(either), before)
    expected = 3.0 * divergence(old, new, batch.labels, 4.0) / batch.answer_tokens
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert float(value) > 1e-3
    value.backward()
    assert all(parameter.grad is not None for parameter in either.parameters())


def results(model: AdaptedModel, rows_a_pass: int) -> list[tuple[float, float]]:
    """Loss and penalty of the steps of a second task, in passes of so many rows."""
    optim = OptimSection(lr=3e-2, batch_size=6, micro_batch_size=rows_a_pass, epochs=3)
    method = meet(Lwf, model, LORA)
    found: list[tuple[float, float]] = []
    for index in range(2):
        context = task(model, index, task_rows(model, index))
        method.begin_task(context)
        plan = BatchPlan(6, 6, 3, index)
        forwards = Forwards(context.rows, plan, optim, 0)
        trainer = TaskTrainer(model, method, context, forwards, optim)
        found.clear()
        trainer.run(lambda result: found.append((result.loss, result.penalty)), lambda: None)
        method.end_task(context)
    return found


def test_a_steps_penalty_is_the_mean_over_its_tokens_however_it_is_split(tiny_model: Path) -> None:
    whole, split = (results(live_model(tiny_model), rows) for rows in (6, 2))
    assert whole[0][1] == pytest.approx(0, abs=1e-5)
    assert whole[2][1] > whole[1][1] > 1e-4
    for one, other in zip(whole, split, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_the_teacher_has_no_dropout_and_draws_no_random_number(tiny_model: Path) -> None:
    model = live_model(tiny_model)
    method = meet(Lwf, model, LORA)
    finish(method, model, 1)
    method.begin_task(task(model, 1, []))
    model.peft.train()
    batch = collate(task_rows(model, 7), 0)
    state = torch.get_rng_state()
    method.before_forward(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.peft.training
    model.peft.eval()
    with torch.no_grad():
        torch.testing.assert_close(method.taught, answer_logits(model, batch))
