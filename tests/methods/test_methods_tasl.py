"""TaSL: importance in plain loops, and every case of the consolidation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rows_support import STEPS, flat, give_gradients, meet, move, rows, start, step, task

from treelora_cli.errors import RunDirError
from treelora_cli.methods.base import EFFECT, StoredTask, TaskMemory
from treelora_cli.methods.tasl import IMPORTANCE, Tasl, marked, normalised, shares_of_earlier
from treelora_cli.recipe import LoraSection

SECTION = LoraSection(rank=3, alpha=6, dropout=0.0)


def work(method: Tasl, index: int, numbers: range = range(STEPS)) -> list[dict]:
    """Random gradients and random steps in place of training."""
    shown = []
    for number in numbers:
        give_gradients(method.model, 10 * index + number)
        method.after_backward(step(number))
        move(method.model, 100 * index + number, 0.05)
        shown.append(method.after_step(step(number)))
    return shown


def learn(method: Tasl, index: int) -> StoredTask:
    context = task(method.model, index, rows(6, index))
    method.begin_task(context)
    work(method, index)
    memory = method.end_task(context)
    snapshot = method.model.snapshot()
    return StoredTask(index, context.name, memory, lambda: snapshot)


def test_importance_is_the_smoothed_product_times_its_smoothed_deviation(tiny_model: Path) -> None:
    a1, a2 = 0.6, 0.3
    method = start(Tasl, tiny_model, {"sensitivity_decay": a1, "uncertainty_decay": a2})
    model = method.model
    context = task(model, 0, rows(6, 0))
    method.begin_task(context)
    keys = list(model.trainable())
    S = dict.fromkeys(keys, 0.0)
    U = dict.fromkeys(keys, 0.0)
    for number in range(STEPS):
        given = dict(zip(keys, give_gradients(model, number), strict=True))
        for key, parameter in model.trainable().items():
            now = np.abs(parameter.detach().double().numpy() * given[key].double().numpy())
            S[key] = a1 * S[key] + (1 - a1) * now
            U[key] = a2 * U[key] + (1 - a2) * np.abs(now - S[key])
        method.after_backward(step(number))
        move(model, number, 0.05)
        assert method.after_step(step(number)) == {}
    scores = np.array([(S[key] * U[key]).mean() for key in keys])
    expected = (scores - scores.min()) / (scores.max() - scores.min())
    memory = method.end_task(context)
    np.testing.assert_allclose(memory.tensors[IMPORTANCE], expected, rtol=1e-3, atol=1e-6)
    assert len(keys) == 8


def test_shares_of_the_four_cases() -> None:
    earlier = torch.tensor([True, True, False, False])
    new = torch.tensor([True, False, True, False])
    found = shares_of_earlier(earlier, new, 0.7).tolist()
    assert found == pytest.approx([0.7, 1.0, 0.0, 0.5])


def test_a_share_of_all_scores_is_marked() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.5, 0.0, 0.6, 0.7])
    assert marked(scores, 0.2).nonzero().flatten().tolist() == [1, 3]
    assert marked(scores, 0.5).nonzero().flatten().tolist() == [1, 3, 6, 8, 9]
    expected = scores.numpy() > np.percentile(scores.numpy(), 65)
    assert marked(scores, 0.35).tolist() == expected.tolist()
    assert normalised(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert normalised(torch.full((3,), 2.0)).tolist() == [0.0, 0.0, 0.0]
    assert not marked(torch.zeros(3), 0.2).any()


def test_matrices_are_kept_taken_over_or_mixed(tiny_model: Path) -> None:
    """Eight matrices, half of them important to each side: all four cases occur."""
    settings = {"important": 0.5, "keep": 0.6, "memory": 0.8}
    method = start(Tasl, tiny_model, settings)
    model = method.model
    learn(method, 0)
    earlier = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.0, 0.3])
    method.importance = earlier
    before = model.snapshot()
    context = task(model, 1, rows(6, 1))
    method.begin_task(context)
    shown = work(method, 1, range(STEPS - 1))
    assert shown == [{}] * (STEPS - 1)
    give_gradients(model, 99)
    method.after_backward(step(STEPS - 1))
    move(model, 99, 0.05)
    trained = model.snapshot()
    method.sensitivity = torch.ones_like(method.sensitivity)
    wanted = torch.tensor([1.0, 0.9, 0.0, 0.1, 0.8, 0.7, 0.2, 0.3])
    sizes = [parameter.numel() for parameter in model.parameters()]
    method.uncertainty = wanted.repeat_interleave(torch.tensor(sizes))
    shown = method.after_step(step(STEPS - 1))
    # Important to both, to both, to the earlier two, to the new two, to none of them.
    shares = [0.6, 0.6, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5]
    mixed = model.snapshot()
    for key, share in zip(model.trainable(), shares, strict=True):
        expected = share * before[key] + (1 - share) * trained[key]
        torch.testing.assert_close(mixed[key], expected)
    taken = flat([trained[key] - mixed[key] for key in mixed]).norm()
    assert shown[EFFECT] == pytest.approx(float(taken), rel=1e-4)
    assert taken > 0.1
    memory = method.end_task(context)
    both = 0.8 * earlier + 0.2 * wanted
    expected = (both - both.min()) / (both.max() - both.min())
    torch.testing.assert_close(memory.tensors[IMPORTANCE], expected)
    assert memory.info == {"kept": 2, "replaced": 2}


def test_the_first_task_is_left_as_it_was_trained(tiny_model: Path) -> None:
    method = start(Tasl, tiny_model)
    context = task(method.model, 0, rows(6, 0))
    method.begin_task(context)
    work(method, 0, range(STEPS - 1))
    give_gradients(method.model, 1)
    method.after_backward(step(STEPS - 1))
    trained = method.model.snapshot()
    assert method.after_step(step(STEPS - 1)) == {}
    method.end_task(context)
    after = method.model.snapshot()
    assert all(after[key].equal(trained[key]) for key in trained)


def test_a_resumed_task_ends_in_the_same_bytes(tiny_model: Path) -> None:
    method = start(Tasl, tiny_model)
    model = method.model
    stored = [learn(method, 0), learn(method, 1)]
    context = task(model, 2, rows(6, 2))
    method.begin_task(context)
    work(method, 2, range(2))
    middle, (tensors, values) = model.snapshot(), method.state()
    tensors = {key: value.clone() for key, value in tensors.items()}
    values = json.loads(json.dumps(values))
    work(method, 2, range(2, STEPS))
    straight, memory = model.snapshot(), method.end_task(context)

    again = meet(Tasl, model, SECTION)
    again.restore(stored)
    again.install(stored)
    again.begin_task(context)
    model.restore(middle)
    again.load_state(tensors, values)
    work(again, 2, range(2, STEPS))
    resumed = model.snapshot()
    assert all(resumed[key].equal(straight[key]) for key in straight)
    assert again.end_task(context).tensors[IMPORTANCE].equal(memory.tensors[IMPORTANCE])
    for found in ({}, {IMPORTANCE: torch.zeros(3)}):
        with pytest.raises(RunDirError, match="without the importance"):
            again.restore([StoredTask(0, "x", TaskMemory(found))])
