"""OGD against finite differences of the logits and dense projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rows_support import flat, give_gradients, meet, move, rows, start, step, task

from treelora_cli.errors import RunDirError
from treelora_cli.methods._memory import sample_rows
from treelora_cli.methods.base import EFFECT, StoredTask, TaskMemory
from treelora_cli.methods.ogd import DIRECTIONS, Ogd, new_direction
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example
from treelora_cli.recipe import LoraSection


def mean_logit(model: AdaptedModel, row: Example) -> torch.Tensor:
    """The mean of the logits of a row's answer tokens, from a plain pass over all its tokens."""
    if row.apart:
        prompt, answer = row.tokens[: row.answer_start], row.tokens[row.answer_start :]
        read = torch.tensor([[0, *answer[:-1]]])  # a decoder begins with the padding token
        logits = model.peft(
            input_ids=torch.tensor([prompt]), decoder_input_ids=read, use_cache=False
        ).logits[0]
    else:
        answer = row.tokens[row.answer_start :]
        logits = model.peft(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0]
        logits = logits[row.answer_start - 1 : -1]
    return torch.stack([logits[at, token] for at, token in enumerate(answer)]).mean()


def learn(method: Ogd, index: int, *, apart: bool = False) -> StoredTask:
    context = task(method.model, index, rows(6, index, apart=apart))
    method.begin_task(context)
    move(method.model, index)
    memory = method.end_task(context)
    snapshot = method.model.snapshot()
    return StoredTask(index, context.name, memory, lambda: snapshot)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_t5"])
def test_directions_span_the_gradients_of_the_true_tokens_logits(kind: str, request) -> None:
    apart = kind == "tiny_t5"
    method = start(Ogd, request.getfixturevalue(kind), {"directions": 4})
    learn(method, 0, apart=apart)
    model, V = method.model, method.basis.double().numpy()
    assert V.shape == (4, model.trainable_count())
    np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-5)
    for row in sample_rows(rows(6, 0, apart=apart), 4, 100):
        value = mean_logit(model, row)
        raw = flat(torch.autograd.grad(value, model.parameters())).double().numpy()
        assert np.linalg.norm(raw - V.T @ (V @ raw)) < 1e-4 * np.linalg.norm(raw)
        # The gradient itself, by finite differences along it.
        parts = torch.from_numpy(raw / np.linalg.norm(raw)).float()
        sizes = [p.numel() for p in model.parameters()]
        values = []
        for sign in (1e-2, -1e-2):
            with torch.no_grad():
                for p, part in zip(model.parameters(), parts.split(sizes), strict=True):
                    p += sign * part.view_as(p)
                values.append(float(mean_logit(model, row)))
                for p, part in zip(model.parameters(), parts.split(sizes), strict=True):
                    p -= sign * part.view_as(p)
        slope = (values[0] - values[1]) / 2e-2
        assert slope == pytest.approx(np.linalg.norm(raw), rel=2e-2)


def test_a_basis_grows_by_what_it_does_not_span() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 40, generator=generator) * torch.tensor([[1.0], [9], [1e-3], [1], [1]])
    vectors[3] = vectors[0] - 2 * vectors[1]
    vectors[4] = vectors[0] * 1000 + vectors[4] * 10  # mostly spanned: needs both passes
    basis = torch.zeros(0, 40)
    sizes = []
    for vector in vectors:
        found = new_direction(basis, vector)
        basis = basis if found is None else torch.cat([basis, found[None]])
        sizes.append(len(basis))
    assert sizes == [1, 2, 3, 3, 4]
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=2e-6)
    Q = np.linalg.qr(vectors[[0, 1, 2, 4]].double().numpy().T)[0]
    np.testing.assert_allclose(basis.T @ basis, Q @ Q.T, atol=1e-4)
    assert new_direction(basis, torch.zeros(40)) is None


def test_gradients_lose_what_earlier_tasks_directions_span(tiny_model: Path) -> None:
    method = start(Ogd, tiny_model, {"directions": 3})
    model = method.model
    context = task(model, 0, rows(6, 0))
    method.begin_task(context)
    given = give_gradients(model, 5)
    method.after_backward(step())
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), given, strict=True))
    assert method.after_step(step()) == {}
    raw = []
    for index in range(2):
        learn(method, index)
        raw += [
            flat(torch.autograd.grad(mean_logit(model, row), model.parameters()))
            for row in sample_rows(rows(6, index), 3, 100 + index)
        ]
    A = torch.stack(raw).double().numpy()
    method.begin_task(task(model, 2, rows(6, 2)))
    g = flat(give_gradients(model, 6)).double().numpy()
    method.after_backward(step())
    found = flat([p.grad for p in model.parameters()]).double().numpy()
    expected = g - A.T @ np.linalg.lstsq(A.T, g, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(A @ found).max() < 1e-4 * np.linalg.norm(A, axis=1).max() * np.linalg.norm(g)
    shown = method.after_step(step())
    assert shown[EFFECT].read()[0] == pytest.approx(np.linalg.norm(g - expected), rel=1e-4)
    assert np.linalg.norm(g - expected) > 0.1


@pytest.mark.parametrize("project", ["gradient", "step"])
def test_only_a_projected_step_keeps_adam_out_of_the_spanned_space(
    tiny_model: Path, project: str
) -> None:
    method = start(Ogd, tiny_model, {"project": project})
    model = method.model
    learn(method, 0)
    method.begin_task(task(model, 1, rows(6, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for number in range(3):
        before = flat(model.parameters()).clone()
        give_gradients(model, number)
        method.after_backward(step(number))
        optimizer.step()
        raw = flat(model.parameters()) - before
        shown = method.after_step(step(number))
        moved = flat(model.parameters()) - before
        spanned = float((method.basis @ moved).norm() / moved.norm())
        assert (spanned < 1e-3) == (project == "step")
        if project == "step":
            taken = float((method.basis @ raw).norm())
            assert shown[EFFECT].read()[0] == pytest.approx(taken, rel=1e-3)
            assert float((raw - moved).norm()) == pytest.approx(taken, rel=1e-2)


def test_a_resumed_stream_has_the_same_directions(tiny_model: Path) -> None:
    method = start(Ogd, tiny_model, {"directions": 4})
    stored = [learn(method, index) for index in range(3)]
    assert [task.memory.info["directions"] for task in stored] == [4, 4, 4]
    again = meet(Ogd, method.model, LoraSection(rank=3, alpha=6, dropout=0.0))
    again.restore(stored)
    assert again.basis.equal(method.basis)
    for tensors in ({}, {DIRECTIONS: torch.zeros(2, 7)}):
        with pytest.raises(RunDirError, match="without directions of this adapter"):
            again.restore([StoredTask(0, "x", TaskMemory(tensors))])
