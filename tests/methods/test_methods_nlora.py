"""N-LoRA's penalty against dense matrices, on grouped-query attention; what it does to a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sums_support import gradients, learn, modules, move, start, step, task

from treelora_cli.errors import UsageError
from treelora_cli.methods.nlora import NLora


@pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
def test_the_penalty_is_the_l1_norm_of_the_dense_change(
    request: pytest.FixtureRequest, base: str
) -> None:
    method = start(NLora, request.getfixturevalue(base), {"lambda": 0.3})
    learn(method, 0)
    method.begin_task(task(1))
    move(method.model, 9)
    pairs = modules(method.model.snapshot())
    if base == "tiny_model":
        assert any(A.shape[1] != B.shape[0] for A, B in pairs)
    penalty = method.penalty(step())
    assert penalty is not None
    expected = 0.3 * sum(np.abs(B @ A).sum() for A, B in pairs)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for (A, B), (by_A, by_B) in zip(pairs, gradients(method.model), strict=True):
        sign = np.sign(B @ A)
        assert by_A is not None
        assert by_B is not None
        np.testing.assert_allclose(by_A, 0.3 * B.T @ sign, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_B, 0.3 * sign @ A.T, rtol=1e-4, atol=1e-5)


def test_it_counts_from_the_first_task_and_not_at_the_start_of_one(tiny_model: Path) -> None:
    method = start(NLora, tiny_model)
    method.begin_task(task(0))
    penalty = method.penalty(step())
    assert penalty is not None
    assert penalty.item() == 0
    penalty.backward()
    assert not any(np.any(by) for pair in gradients(method.model) for by in pair)
    move(method.model, 1)
    moved = method.penalty(step())
    assert moved is not None
    assert moved.item() > 0
    without = start(NLora, tiny_model, {"lambda": 0})
    without.begin_task(task(0))
    assert without.penalty(step()) is None


def test_the_released_product_is_refused_where_it_does_not_exist(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.v_proj has 32 and 16") as refused:
        start(NLora, tiny_model, {"product": "AB"})
    assert "product=BA" in refused.value.hint


def test_the_released_product_where_it_does(tiny_model: Path) -> None:
    settings = {"product": "AB", "lambda": 0.4}
    method = start(NLora, tiny_model, settings, targets=("q_proj", "o_proj"))
    method.begin_task(task(0))
    move(method.model, 9)
    penalty = method.penalty(step())
    assert penalty is not None
    pairs = modules(method.model.snapshot())
    assert penalty.item() == pytest.approx(
        0.4 * sum(np.abs(A @ B).sum() for A, B in pairs), rel=1e-5
    )
    assert penalty.item() != pytest.approx(0.4 * sum(np.abs(B @ A).sum() for A, B in pairs))


def test_descent_makes_a_change_sparse_where_nothing_speaks_for_it(tiny_model: Path) -> None:
    """A change of which some rows are wanted: the penalty takes the rest to nearly nothing."""
    method = start(NLora, tiny_model, {"lambda": 0.02})
    method.begin_task(task(0))
    move(method.model, 1)
    pair = method.live[0]
    wanted = torch.zeros(pair.B.shape[0], pair.A.shape[1])
    wanted[:4] = torch.randn(4, pair.A.shape[1], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(method.model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        change = pair.B @ pair.A
        penalty = method.penalty(step())
        assert penalty is not None
        (((change - wanted)[:4] ** 2).sum() + penalty).backward()
        optimizer.step()
    change = (pair.B @ pair.A).detach().abs()
    assert change[4:].mean() < 0.02 * change[:4].mean()
