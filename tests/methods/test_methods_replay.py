"""Replay: what joins a step, against row-by-row losses of the bare model; what a task leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from rows_support import flat, move, rows, start, step, task
from support import toy_arguments

from treelora_cli.errors import RunDirError
from treelora_cli.methods.base import Method, StoredTask, TaskMemory
from treelora_cli.methods.replay import Replay
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example
from treelora_cli.rundir.events import read_events


def learn(method: Method, index: int, examples: Sequence[Example]) -> StoredTask:
    """Begin and end a task without steps between."""
    context = task(method.model, index, examples)
    method.begin_task(context)
    memory, answer = method.end_task(context), method.model.answer()
    return StoredTask(index, context.name, memory, lambda: answer)


def row_losses(model: AdaptedModel, row: Example) -> torch.Tensor:
    """Negative log-probabilities of a row's answer tokens, from the whole logits of it alone."""
    ids = torch.tensor([row.tokens])
    logits = model.peft(input_ids=ids).logits[0].double()
    shares = logits - logits.logsumexp(-1, keepdim=True)
    places = range(row.answer_start, len(row.tokens))
    return torch.stack([-shares[at - 1, row.tokens[at]] for at in places])


def drawn_rows(
    mean: torch.Tensor, losses: dict[int, torch.Tensor], count: int
) -> tuple[int, ...] | None:
    """The ``count`` rows whose answer tokens have this mean loss; None: no such rows."""
    for some in combinations(losses, count):
        if math.isclose(torch.cat([losses[row] for row in some]).mean(), mean, rel_tol=1e-5):
            return some
    return None


def test_nothing_joins_the_first_task(tiny_model: Path) -> None:
    method = start(Replay, tiny_model)
    method.begin_task(task(method.model, 0, rows(6, 1)))
    assert method.penalty(step()) is None
    assert method.rehearsal(0) == ()


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (0.5, 2), (0.05, 1), (9.0, 5)])
def test_a_step_is_joined_by_the_mean_loss_of_rows_of_earlier_tasks(
    tiny_model: Path, ratio: float, count: int
) -> None:
    """With 4 rows a step (8 rows in 2 steps an epoch), m drawn rows count m / 4."""
    method = start(Replay, tiny_model, {"ratio": ratio})
    move(method.model, 1)
    old = rows(5, 1)
    learn(method, 0, old)
    method.begin_task(task(method.model, 1, rows(8, 2)))
    losses = {number: row_losses(method.model, row).detach() for number, row in enumerate(old)}
    found = set()
    for number in range(6):
        penalty = method.penalty(step(number))
        assert penalty is not None
        drawn = drawn_rows(penalty.detach() / (count / 4), losses, count)
        assert drawn is not None
        found.add(drawn)
    assert len(found) > 1 or count == 5


def test_the_joined_gradient_has_the_direction_of_the_mean_over_all_rows(tiny_model: Path) -> None:
    method = start(Replay, tiny_model, {"ratio": 0.5})
    model = method.model
    move(model, 1)
    old, new = [rows(9, 1)[number] for number in (0, 3)], [rows(9, 2)[n] for n in (0, 3, 6, 0)]
    learn(method, 0, old)
    context = task(model, 1, [*new, *new])
    method.begin_task(context)
    penalty = method.penalty(step())
    assert penalty is not None
    joined = flat(torch.autograd.grad(context.ask.loss(new) + penalty, model.parameters()))
    # All of these rows have one answer token, so that the mean over tokens is that over rows.
    whole = flat(context.ask.gradient([*old, *new]))
    torch.testing.assert_close(joined / 1.5, whole, rtol=1e-4, atol=1e-6)


def test_a_reservoir_holds_all_earlier_rows_equally_often(tiny_model: Path) -> None:
    first, second = rows(12, 1), rows(6, 2)
    model = start(Replay, tiny_model).model
    held = dict.fromkeys((row.tokens for row in [*first, *second]), 0)
    trials = 400
    for seed in range(trials):
        method = Replay(Replay.Settings.model_validate({"rows": 6}))
        method.start(None, model)  # type: ignore[arg-type]
        for index, some in enumerate((first, second)):
            context = task(model, index, some)
            object.__setattr__(context, "seed", 1000 * index + seed)
            memory = method.end_task(context)
        assert memory.info == {"rows_kept": 6, "rows_seen": 12 + 6 * index}
        for row in method.memories[-1].rows:
            held[row.tokens] += 1
    # Each of 18 rows is held with probability 6 / 18; five standard deviations.
    spread = math.sqrt(trials * (1 / 3) * (2 / 3))
    assert all(abs(count - trials / 3) < 5 * spread for count in held.values()), held.values()


@pytest.mark.parametrize("way", ["reservoir", "trace"])
def test_a_restored_method_goes_on_as_the_one_that_learned(tiny_model: Path, way: str) -> None:
    settings = {"way": way, "rows": 5, "share": 0.4}
    method = start(Replay, tiny_model, settings)
    stored = [learn(method, index, rows(7, index)) for index in range(2)]
    again = Replay(method.settings)
    again.start(method.stream, method.model)
    again.restore(stored)
    assert again.memories == method.memories
    assert again.seen == method.seen == 14
    assert list(again.rehearsal(2)) == list(method.rehearsal(2))
    context = task(method.model, 2, rows(4, 9))
    for one in (method, again):
        one.begin_task(context)
    for number in range(3):
        losses = [one.penalty(step(number)) for one in (method, again)]
        assert (losses[0] is None) == (way == "trace")
        if losses[0] is not None:
            assert torch.equal(*losses)
    assert again.end_task(context).tensors.keys() == method.end_task(context).tensors.keys()
    assert again.memories == method.memories


def test_rows_that_are_gone_are_missed(tiny_model: Path) -> None:
    method = start(Replay, tiny_model)
    with pytest.raises(RunDirError, match="rows of task alpha"):
        method.restore([StoredTask(0, "alpha", TaskMemory(info={"rows_seen": 3}))])


def test_traces_way_is_the_first_rows_of_each_earlier_task(tiny_model: Path) -> None:
    method = start(Replay, tiny_model, {"way": "trace", "share": 0.25})
    tasks = [rows(7, 1), rows(4, 2), rows(9, 3)]
    for index, some in enumerate(tasks):
        assert list(method.rehearsal(index)) == [
            row for earlier in tasks[:index] for row in earlier[: math.ceil(len(earlier) / 4)]
        ]
        assert method.rehearsal_size([len(e) for e in tasks[:index]]) == len(
            method.rehearsal(index)
        )
        learn(method, index, some)
    assert start(Replay, tiny_model).rehearsal_size([100]) == 0


def test_a_stream_in_traces_way(treelora, tiny_model, toy_data, tmp_path) -> None:
    """Each step of the last epoch is counted, and a dry run foretells them."""
    run = tmp_path / "run"
    sets = ["--set", "method.way=trace", "--set", "method.share=0.5", "--set", "eval.when=none"]
    asked = toy_arguments(
        tiny_model, toy_data, run, "alpha,beta,gamma", "--method", "replay", *sets
    )
    plan = json.loads(treelora(*asked, "--dry-run", "--json").out)
    done = treelora(*asked)
    assert done.code == 0, done
    started = [e for e in read_events(run / "events.jsonl") if e["kind"] == "task_started"]
    assert [event["rehearsed"] for event in started] == [0, 6, 12]
    assert [event["steps"] for event in started] == [6, 8, 9]
    assert [one["steps"] for one in plan["tasks"]] == [6, 8, 9]
