"""O-LoRA's penalty against a loop over earlier tasks and rows of A; who gets its gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sums_support import gradients, learn, modules, move, start, step, task

from treelora_cli.methods.olora import OLora
from treelora_cli.models.snapshot import Snapshot

FORMS = {"absolute": np.abs, "squared": np.square}
BASES = ["tiny_model", "tiny_t5"]


def third_task(method: OLora) -> list[Snapshot]:
    """Learn two tasks, walk into a third; return what each of the two trained."""
    owns = [learn(method, index)[1] for index in range(2)]
    method.begin_task(task(2))
    move(method.model, 9)
    return owns


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_the_penalty_is_the_overlap_with_each_earlier_task(
    request: pytest.FixtureRequest, base: str, form: str
) -> None:
    method = start(OLora, request.getfixturevalue(base), {"form": form, "lambda": 0.3})
    owns = third_task(method)
    live = modules(method.model.snapshot())
    expected = 0.0
    for own in owns:
        for (past, _), (A, _) in zip(modules(own), live, strict=True):
            for i in range(past.shape[0]):
                for j in range(A.shape[0]):
                    expected += 0.3 * float(FORMS[form](np.sum(past[i] * A[j])))
    penalty = method.penalty(step())
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_only_the_live_a_is_pushed_and_by_the_derivative(tiny_model: Path, form: str) -> None:
    method = start(OLora, tiny_model, {"form": form, "lambda": 0.3})
    owns = third_task(method)
    penalty = method.penalty(step())
    assert penalty is not None
    penalty.backward()
    live = modules(method.model.snapshot())
    for number, (by_A, by_B) in enumerate(gradients(method.model)):
        past = np.concatenate([modules(own)[number][0] for own in owns])
        overlap = past @ live[number][0].T
        slope = np.sign(overlap) if form == "absolute" else 2 * overlap
        assert by_A is not None
        np.testing.assert_allclose(by_A, 0.3 * slope.T @ past, rtol=1e-4, atol=1e-6)
        assert by_B is None
    assert all(p.grad is None for p in method.model.past_parameters.values())


def test_norms_count_from_the_first_task_on_and_are_not_squared(tiny_model: Path) -> None:
    method = start(OLora, tiny_model, {"lambda2": 0.2})
    method.begin_task(task(0))
    penalty = method.penalty(step())
    assert penalty is not None
    penalty.backward()
    # Each B is zero now, where the norm has no derivative.
    assert all(by_B is not None and not by_B.any() for _, by_B in gradients(method.model))
    move(method.model, 1)
    found = method.penalty(step())
    pairs = modules(method.model.snapshot())
    expected = 0.2 * sum(np.sqrt((factor**2).sum()) for pair in pairs for factor in pair)
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-5)
    method.install([learn(method, 0)[0]])
    method.begin_task(task(1))
    both = method.penalty(step())
    method.settings = method.settings.model_copy(update={"lambda2": 0.0})
    overlap = method.penalty(step())
    norms = 0.2 * sum(
        np.sqrt((factor**2).sum()) for pair in modules(method.model.snapshot()) for factor in pair
    )
    assert both is not None
    assert overlap is not None
    assert both.item() == pytest.approx(overlap.item() + norms, rel=1e-5)


def test_nothing_is_added_where_there_is_nothing_to_keep_away_from(tiny_model: Path) -> None:
    method = start(OLora, tiny_model)
    method.begin_task(task(0))
    assert method.penalty(step()) is None
    without = start(OLora, tiny_model, {"lambda": 0})
    third_task(without)
    assert without.penalty(step()) is None


def test_descent_on_the_penalty_makes_the_live_a_orthogonal(tiny_model: Path) -> None:
    method = start(OLora, tiny_model, {"form": "squared"})
    third_task(method)
    first = method.penalty(step())
    assert first is not None
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        penalty = method.penalty(step())
        assert penalty is not None
        penalty.backward()
        optimizer.step()
    assert penalty.item() < 1e-3 * first.item()
    assert all(np.abs(A).max() > 0.01 for A, _ in modules(method.model.snapshot()))


def test_nothing_but_the_adapter_is_needed_to_go_on_inside_a_task(tiny_model: Path) -> None:
    method = start(OLora, tiny_model)
    stored = [learn(method, index)[0] for index in range(2)]
    method.begin_task(task(2))
    move(method.model, 9)
    middle, penalty = method.model.snapshot(), method.penalty(step())
    assert method.state() == ({}, {})
    again = start(OLora, tiny_model)
    again.restore(stored)
    again.install(stored)
    again.begin_task(task(2))
    again.model.restore(middle)
    again.load_state({}, {})
    resumed = again.penalty(step())
    assert penalty is not None
    assert resumed is not None
    assert resumed.equal(penalty)


def test_negative_weights_are_refused() -> None:
    for name in ("lambda", "lambda2"):
        with pytest.raises(ValidationError):
            OLora.Settings.model_validate({name: -1})
