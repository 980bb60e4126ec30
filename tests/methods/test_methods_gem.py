"""GEM: its program against all active sets, its projection against gradients had another way."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
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

from treelora_cli.errors import DivergedError
from treelora_cli.methods._cone import cone_weights
from treelora_cli.methods.base import EFFECT
from treelora_cli.methods.gem import Gem


@pytest.fixture
def model(tiny_model: Path):
    return live_model(tiny_model)


def least(G: np.ndarray, g: np.ndarray, margin: float) -> float:
    """The least |g + G^T v|^2 / 2 over v >= margin: of all choices of entries at the margin."""
    found = []
    for at_margin in itertools.product([False, True], repeat=len(G)):
        bound = np.array(at_margin)
        v = np.full(len(G), margin)
        fixed = g + G[bound].T @ v[bound]
        if not bound.all():
            v[~bound] = np.linalg.lstsq(G[~bound].T, -fixed, rcond=None)[0]
        if (v >= margin - 1e-9).all():
            found.append(float(((g + G.T @ v) ** 2).sum() / 2))
    return min(found)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_program_is_solved_exactly(margin: float) -> None:
    random = np.random.default_rng(0)
    solved = 0
    for trial in range(300):
        count, width = random.integers(1, 7), random.integers(1, 7)
        G = random.normal(size=(count, width))
        if trial % 2:
            G += 2 * random.normal(size=width)  # alike: one constraint may stand for another
        G *= 10 ** random.uniform(-2, 2, size=(count, 1))
        if trial % 3 == 0 and count > 1:
            G[1] = G[0] * random.choice([-1, 1, 3])  # dependent: no unique v
        if trial % 7 == 0:
            G[0] = 0
        g = random.normal(size=width)
        both = np.vstack([g, G])
        v = cone_weights(both @ both.T, margin)
        if (G @ g >= 0).all():
            assert (v == 0).all()
            continue
        solved += 1
        assert (v >= margin).all()
        after = g + G.T @ v
        scale = float(((g + margin * G.sum(axis=0)) ** 2).sum() / 2)
        assert float(after @ after) / 2 == pytest.approx(least(G, g, margin), abs=1e-9 * scale)
        lengths = np.linalg.norm(G, axis=1) * np.sqrt(2 * scale)
        assert (G @ after >= -1e-10 * lengths).all()
        assert np.abs((v - margin) * (G @ after)).max() <= 1e-9 * scale
    assert solved > 150


def test_one_memory_has_a_closed_form() -> None:
    g, r = np.array([1.0, -2.0]), np.array([0.0, 4.0])
    both = np.vstack([g, r])
    assert cone_weights(both @ both.T, 0.0) == pytest.approx([0.5])  # -<g, r> / <r, r>
    assert cone_weights(both @ both.T, 0.75) == pytest.approx([0.75])
    assert cone_weights(np.ones((1, 1)), 0.5).shape == (0,)


def against(gradients: list[torch.Tensor]) -> torch.Tensor:
    """A gradient that disagrees with the first two and agrees with the others."""
    generator = torch.Generator().manual_seed(9)
    g = torch.randn(gradients[0].shape, generator=generator)
    for number, past in enumerate(gradients):
        wanted = (-0.3 if number < 2 else 0.4) * past.norm()
        g = g + (wanted - g @ past) * past / (past @ past)
    return g


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_after_the_projection_no_stored_gradient_disagrees(model, margin: float) -> None:
    method = meet(Gem, model, LORA, {"margin": margin, "drawn": "all"})
    finish(method, model, 3)
    method.begin_task(task(model, 3, []))
    past = [mean_gradient(model, task_rows(model, index)) for index in range(3)]
    g = against(past)
    before = [float(g @ r) for r in past]
    assert sum(product < 0 for product in before) >= 2
    give(model, g)
    method.after_backward(step())
    found = taken(model)
    for r in past:
        assert float(found @ r) >= -1e-4 * float(r.norm() * g.norm())
    G = torch.stack(past).double().numpy()
    expected = least(G, g.double().numpy(), margin)
    assert float(found.double() @ found.double()) / 2 == pytest.approx(expected, rel=1e-4)
    shown = method.after_step(step())
    assert shown[EFFECT] == pytest.approx(float((found - g).norm()), rel=1e-4)
    assert shown["conflicts"] == sum(product < 0 for product in before)


def test_a_gradient_that_agrees_is_left_alone_to_the_bit(model) -> None:
    method = meet(Gem, model, LORA, {"drawn": "all"})
    method.begin_task(task(model, 0, []))
    give(model, torch.ones(model.trainable_count()))
    method.after_backward(step())
    assert method.after_step(step()) == {}
    finish(method, model, 2)
    method.begin_task(task(model, 2, []))
    g = sum(mean_gradient(model, task_rows(model, index)) for index in range(2))
    give(model, g)
    method.after_backward(step())
    assert torch.equal(taken(model), g)
    assert method.after_step(step()) == {EFFECT: 0.0, "conflicts": 0}


def test_rows_are_kept_drawn_by_step_and_read_back(model) -> None:
    method = meet(Gem, model, LORA, {"rows": 5, "drawn": 2})
    stored = finish(method, model, 2)
    assert [len(memory) for memory in method.memories] == [5, 5]
    assert stored[0].memory.info == {"rows_kept": 5}
    again = meet(Gem, model, LORA, {"rows": 5, "drawn": 2})
    again.restore(stored)
    assert again.memories == method.memories
    results = []
    for one in (method, again):
        one.begin_task(task(model, 2, []))
        asked = [[one._drawn(k, step(s)) for k in range(2)] for s in range(6)]
        assert all(len(rows) == 2 for step in asked for rows in step)
        assert all(
            row in one.memories[k].rows for step in asked for k in range(2) for row in step[k]
        )
        assert len({tuple(step[0]) for step in asked}) > 2
        give(model, torch.linspace(-1, 1, model.trainable_count()))
        one.after_backward(step(4))
        results.append((asked, taken(model), one.after_step(step(4))))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_an_encoder_decoder_is_projected_too(tiny_t5: Path) -> None:
    model = live_model(tiny_t5)
    method = meet(Gem, model, LORA, {"margin": 0.0, "drawn": "all"})
    finish(method, model, 1)
    method.begin_task(task(model, 1, []))
    r = mean_gradient(model, task_rows(model, 0))
    g = torch.randn(r.shape, generator=torch.Generator().manual_seed(1))
    g = g - (g @ r + r.norm()) * r / (r @ r)
    give(model, g)
    method.after_backward(step())
    torch.testing.assert_close(taken(model), g - (g @ r) * r / (r @ r), rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_told_at_once(model) -> None:
    method = meet(Gem, model, LORA)
    finish(method, model, 1)
    method.begin_task(task(model, 1, []))
    give(model, torch.full((model.trainable_count(),), torch.nan))
    with pytest.raises(DivergedError, match="task1: a gradient is not finite at step 3"):
        method.after_backward(step(2))
