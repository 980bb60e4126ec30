"""C-LoRA's penalty against dense matrices: it is the sum of earlier changes that counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sums_support import gradients, learn, modules, move, start, step, task

from treelora_cli.methods import _products
from treelora_cli.methods.base import StoredTask, TaskMemory
from treelora_cli.methods.clora import CLora

SCALE = 2.0  # alpha / rank


@pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
def test_the_penalty_is_of_the_dense_changes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setattr(_products, "CPU_ENTRIES", 160)  # five rows at a time
    method = start(CLora, request.getfixturevalue(base), {"lambda": 3.0})
    owns = [learn(method, index)[1] for index in range(2)]
    method.begin_task(task(2))
    move(method.model, 9)
    pairs = modules(method.model.snapshot())
    earlier = [
        SCALE * sum(B @ A for A, B in of_module)
        for of_module in zip(*(modules(own) for own in owns), strict=True)
    ]
    penalty = method.penalty(step())
    assert penalty is not None
    changes = [SCALE * B @ A for A, B in pairs]
    terms = [((np.abs(P) * D) ** 2).sum() for P, D in zip(earlier, changes, strict=True)]
    assert penalty.item() == pytest.approx(3.0 * sum(terms), rel=1e-4)
    penalty.backward()
    for (A, B), P, D, (by_A, by_B) in zip(
        pairs, earlier, changes, gradients(method.model), strict=True
    ):
        slope = 3.0 * 2 * P**2 * D * SCALE
        assert by_A is not None
        assert by_B is not None
        np.testing.assert_allclose(by_A, B.T @ slope, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(by_B, slope @ A.T, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in method.model.past_parameters.values())


def test_changes_that_cancel_leave_the_weights_free(tiny_model: Path) -> None:
    method = start(CLora, tiny_model, {"lambda": 3.0})
    stored, own = learn(method, 0)
    method.begin_task(task(1))
    move(method.model, 9)
    before = method.penalty(step())
    assert before is not None
    assert before.item() > 1e-3
    back = {key: -value if ".lora_B." in key else value for key, value in own.items()}
    method.model.restore(back)
    answer = method.model.answer()
    method.install([stored, StoredTask(1, "task1", TaskMemory(), lambda: answer)])
    method.begin_task(task(2))
    move(method.model, 9)
    free = method.penalty(step())
    assert free is not None
    assert free.item() < 1e-9 * before.item()


def test_nothing_is_added_without_earlier_tasks_or_weight(tiny_model: Path) -> None:
    method = start(CLora, tiny_model)
    method.begin_task(task(0))
    move(method.model, 1)
    assert method.penalty(step()) is None
    without = start(CLora, tiny_model, {"lambda": 0})
    learn(without, 0)
    without.begin_task(task(1))
    assert without.penalty(step()) is None


def test_descent_moves_the_change_away_from_what_was_changed(tiny_model: Path) -> None:
    """The first task changes some rows of a module; the second one is free in the others."""
    method = start(CLora, tiny_model, {"lambda": 1.0})
    method.begin_task(task(0))
    move(method.model, 1, 0.3)
    with torch.no_grad():
        for pair in method.live:
            pair.B[4:] = 0
    answer = method.model.answer()
    method.install([StoredTask(0, "task0", TaskMemory(), lambda: answer)])
    method.begin_task(task(1))
    move(method.model, 2, 0.3)
    start_of = [(pair.B @ pair.A).detach().square().mean(1) for pair in method.live]
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = method.penalty(step())
        assert penalty is not None
        penalty.backward()
        optimizer.step()
    for pair, before in zip(method.live, start_of, strict=True):
        after = (pair.B @ pair.A).detach().square().mean(1)
        assert after[:4].mean() < 0.1 * before[:4].mean()
        assert after[4:].mean() > 0.3 * before[4:].mean()
