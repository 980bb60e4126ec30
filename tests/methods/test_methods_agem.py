"""A-GEM: its projection against the closed form, on gradients had another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradient_support import (
    LORA,
    finish,
    give,
    live_model,
    mean_gradient,
    taken,
    task_rows,
)
from rows_support import meet, step, task

from treelora_cli.methods.agem import Agem
from treelora_cli.methods.base import EFFECT
from treelora_cli.models.readback import Readback


@pytest.fixture
def model(tiny_model: Path):
    return live_model(tiny_model)


@pytest.mark.parametrize("sign", [-1, 1])
def test_only_what_opposes_the_stored_rows_is_taken_away(model, sign: int) -> None:
    method = meet(Agem, model, LORA, {"drawn": "all"})
    finish(method, model, 3)
    method.begin_task(task(model, 3, []))
    r = mean_gradient(model, [row for index in range(3) for row in task_rows(model, index)])
    g = torch.randn(r.shape, generator=torch.Generator().manual_seed(1))
    g = g - (g @ r - sign * 0.5 * r.norm()) * r / (r @ r)
    give(model, g)
    method.after_backward(step())
    found = taken(model)
    effect = method.after_step(step())[EFFECT]
    assert isinstance(effect, Readback)
    if sign > 0:
        assert torch.equal(found, g)
        assert effect.read() == [0.0]
    else:
        torch.testing.assert_close(found, g - (g @ r) * r / (r @ r), rtol=1e-4, atol=1e-5)
        assert abs(float(found @ r)) < 1e-4 * float(r.norm())
        assert effect.read() == [pytest.approx(0.5, rel=1e-4)]


def test_nothing_is_done_before_there_is_a_memory_or_without_a_gradient(model) -> None:
    method = meet(Agem, model, LORA, {"drawn": "all"})
    method.begin_task(task(model, 0, []))
    give(model, torch.ones(model.trainable_count()))
    method.after_backward(step())
    assert method.after_step(step()) == {}
    assert torch.equal(taken(model), torch.ones(model.trainable_count()))
    finish(method, model, 1)
    method.begin_task(task(model, 1, []))
    for parameter in model.parameters():
        parameter.grad = None
    method.after_backward(step())
    assert torch.equal(taken(model), torch.zeros(model.trainable_count()))


def test_rows_are_drawn_from_all_tasks_by_step_and_read_back(model, monkeypatch) -> None:
    method = meet(Agem, model, LORA, {"rows": 4, "drawn": 3})
    stored = finish(method, model, 3)
    again = meet(Agem, model, LORA, {"rows": 4, "drawn": 3})
    again.restore(stored)
    seen: dict[Agem, list[list[object]]] = {}
    for one in (method, again):
        context = task(model, 3, [])
        one.begin_task(context)
        asked = seen[one] = []
        gradient = context.ask.gradient
        monkeypatch.setattr(
            context.ask, "gradient", lambda rows, a=asked, g=gradient: a.append(rows) or g(rows)
        )
        for number in range(8):
            give(model, torch.ones(model.trainable_count()))
            one.after_backward(step(number))
    assert seen[method] == seen[again]
    assert all(len(rows) == 3 for rows in seen[method])
    places = [memory.rows for memory in method.memories]
    tasks = {index for rows in seen[method] for row in rows for index in range(3)
             if row in places[index]}  # fmt: skip
    assert tasks == {0, 1, 2}
    assert len({tuple(rows) for rows in seen[method]}) > 4
