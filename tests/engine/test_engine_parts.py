"""The engine's small parts against plain recomputation."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from treelora_cli.engine.plan import merge_tasks
from treelora_cli.engine.seeds import derive
from treelora_cli.engine.signals import StopFlag
from treelora_cli.errors import Interrupted, RunDirError, UsageError
from treelora_cli.recipe import OptimSection


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_visits_every_row_once(rows: int, batch: int, epochs: int, seed: int) -> None:
    plan = BatchPlan(rows, batch, epochs, seed)
    steps = [plan.rows(step) for step in range(plan.steps)]
    assert plan.steps == epochs * -(-rows // batch)
    for epoch in range(epochs):
        mine = [row for step, chosen in enumerate(steps) if plan.epoch_of(step) == epoch
                for row in chosen]  # fmt: skip
        assert sorted(mine) == list(range(rows))
    fresh = BatchPlan(rows, batch, epochs, seed)
    backwards = [fresh.rows(step) for step in reversed(range(plan.steps))]
    assert backwards[::-1] == steps


def test_epochs_differ_in_order_and_seeds_matter() -> None:
    plan = BatchPlan(40, 40, 2, 1)
    assert plan.rows(0) != plan.rows(1)
    assert plan.rows(0) != BatchPlan(40, 40, 2, 2).rows(0)


def test_derived_seeds_differ_by_every_part() -> None:
    seeds = {derive(1, "task", 0), derive(2, "task", 0), derive(1, "task", 1), derive(1, "x", 0)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.5), ("constant", 1, 1.0), ("constant", 9, 1.0),
        ("linear", 2, 1.0), ("linear", 6, 0.1 + 0.9 * 0.5), ("linear", 10, 0.1),
        ("cosine", 6, 0.1 + 0.9 * 0.5), ("cosine", 10, 0.1),
    ],
)  # fmt: skip
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    section = OptimSection(lr=1.0, warmup_steps=2, schedule=schedule, final_lr=0.1)
    assert learning_rate(section, step, 10) == pytest.approx(expected)


def test_optimizer_state_round_trip_and_mismatch() -> None:
    def fresh(width: int) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, width)), torch.nn.Parameter(torch.ones(2))]
        named = {str(number): parameter for number, parameter in enumerate(parameters)}
        return parameters, build_optimizer(named, OptimSection(lr=0.1))

    def walk(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for parameter in parameters:
            parameter.grad = parameter.detach() * 2
        optimizer.step()

    left, first = fresh(4)
    walk(left, first)
    right, second = fresh(4)
    for mine, theirs in zip(right, left, strict=True):
        mine.data.copy_(theirs.data)
    load_optimizer_tensors(second, optimizer_tensors(first))
    walk(left, first)
    walk(right, second)
    assert all(a.equal(b) for a, b in zip(left, right, strict=True))
    with pytest.raises(RunDirError, match="does not fit"):
        load_optimizer_tensors(fresh(5)[1], optimizer_tensors(first))


def test_tasks_of_a_run_keep_their_order() -> None:
    assert merge_tasks(["a", "b"], ["b", "c"]) == ["a", "b", "c"]
    assert merge_tasks(["a", "b"], []) == ["a", "b"]
    assert merge_tasks([], ["a"]) == ["a"]
    with pytest.raises(UsageError, match="in the order a, b"):
        merge_tasks(["a", "b"], ["b", "a"])


def test_a_signal_sets_a_flag_and_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    with StopFlag() as stop:
        stop.raise_if_set("not yet")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as raised:
            stop.raise_if_set("stopped", "go on")
        assert raised.value.exit_code == 143
    assert {number: signal.getsignal(number) for number in (1, 2, 15)} == before
