"""I-LoRA: the loss of replayed rows against plain passes, the running mean, and who answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rows_support import STEPS, flat, give_gradients, meet, move, rows, start, step, task
from torch.nn import functional

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.methods._memory import Memory, draw, reservoir
from treelora_cli.methods.base import EFFECT, StoredTask, TaskMemory
from treelora_cli.methods.ilora import OTHER, ILora
from treelora_cli.models import forward
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.hidden import answer_hidden
from treelora_cli.recipe import LoraSection

SECTION = LoraSection(rank=3, alpha=6, dropout=0.0)


def read_plainly(model: AdaptedModel, row: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits where a row's answer is predicted, from a pass over all of it."""
    prompt, answer = row.tokens[: row.answer_start], row.tokens[row.answer_start :]
    if row.apart:
        out = model.peft(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[0, *answer[:-1]]]),
            output_hidden_states=True,
            use_cache=False,
        )
        # A T5 with tied embeddings scales what its output layer reads.
        return out.decoder_hidden_states[-1][0] * 32**-0.5, out.logits[0]
    out = model.peft(
        input_ids=torch.tensor([row.tokens]), output_hidden_states=True, use_cache=False
    )
    return out.hidden_states[-1][0][row.answer_start - 1 : -1], out.logits[0][
        row.answer_start - 1 : -1
    ]


def learn(method: ILora, index: int, *, apart: bool = False) -> StoredTask:
    context = task(method.model, index, rows(6, index, apart=apart))
    method.begin_task(context)
    for number in range(STEPS):
        give_gradients(method.model, number)
        method.after_backward(step(number))
        move(method.model, 10 * index + number)
        method.after_step(step(number))
    memory = method.end_task(context)
    snapshot = method.model.snapshot()
    stored = StoredTask(index, context.name, memory, lambda: snapshot)
    method.install([stored])
    return stored


@pytest.mark.parametrize(
    ("kind", "compare"), [("tiny_model", "hidden"), ("tiny_model", "logits"), ("tiny_t5", "hidden")]
)
def test_the_gradient_is_that_of_the_loss(kind: str, compare: str, request) -> None:
    """L = (L_new + L_old) / 2 + consistency * mean of squares, by autograd on plain passes."""
    apart, weight = kind == "tiny_t5", 3.0
    settings = {"consistency": weight, "compare": compare, "drawn": 4}
    method = start(ILora, request.getfixturevalue(kind), settings)
    model = method.model
    learn(method, 0, apart=apart)
    context = task(model, 1, rows(6, 1, apart=apart))
    method.begin_task(context)
    move(model, 7, 0.3)
    fast = model.snapshot()
    slow = {key: value.clone() for key, value in method.slow.items()}
    given = give_gradients(model, 3)
    method.after_backward(step(2))
    found = [parameter.grad for parameter in model.parameters()]
    assert all(model.snapshot()[key].equal(fast[key]) for key in fast)
    shown = method.after_step(step(2))

    drawn = draw(method.rows.rows, 4, context.seed, 2)
    assert {row.tokens for row in drawn} <= {row.tokens for row in rows(6, 0)}
    model.restore(slow)
    with torch.no_grad():
        targets = [read_plainly(model, row)[compare == "logits"] for row in drawn]
    model.restore(fast)
    losses, squares = [], []
    for row, target in zip(drawn, targets, strict=True):
        hidden, logits = read_plainly(model, row)
        answer = torch.tensor(row.tokens[row.answer_start :])
        losses.append(functional.cross_entropy(logits, answer, reduction="none"))
        squares.append(((logits if compare == "logits" else hidden) - target).square())
    loss = torch.cat(losses).mean() / 2 + weight * torch.cat(squares).mean()
    expected = torch.autograd.grad(loss, model.parameters())
    for parameter, new, old in zip(found, given, expected, strict=True):
        torch.testing.assert_close(parameter, new / 2 + old, rtol=1e-3, atol=2e-6)
    assert shown[EFFECT] == 4
    assert shown["consistency"].read()[0] == pytest.approx(
        float(torch.cat(squares).detach().mean()), 1e-3
    )
    assert torch.cat(squares).detach().mean() > 1e-6


def test_the_first_task_has_nothing_to_draw(tiny_model: Path) -> None:
    method = start(ILora, tiny_model)
    method.begin_task(task(method.model, 0, rows(6, 0)))
    given = give_gradients(method.model, 1)
    method.after_backward(step())
    assert all(p.grad.equal(g) for p, g in zip(method.model.parameters(), given, strict=True))
    assert method.after_step(step()) == {}


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_the_slow_adapter_is_the_mean_and_then_the_moving_average(
    tiny_model: Path, decay: float
) -> None:
    method = start(ILora, tiny_model, {"decay": decay})
    model = method.model
    method.begin_task(task(model, 0, rows(6, 0)))
    seen = [flat(model.parameters()).double()]
    slow = seen[0]
    for number in range(6):
        move(model, number)
        method.after_step(step(number))
        seen.append(flat(model.parameters()).double())
        kept = min((number + 1) / (number + 2), decay)
        slow = kept * slow + (1 - kept) * seen[-1]
        found = flat(list(method.slow.values())).double()
        torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-6)
    if decay == 0.99:
        torch.testing.assert_close(found, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-6)
    if decay == 0:
        assert found.equal(seen[-1])


@pytest.mark.parametrize("answers", ["slow", "fast"])
def test_one_answers_and_the_fast_one_goes_on(tiny_model: Path, answers: str) -> None:
    method = start(ILora, tiny_model, {"answers": answers, "memory": 8})
    model = method.model
    context = task(model, 0, rows(6, 0))
    method.begin_task(context)
    for number in range(3):
        move(model, number)
        method.after_step(step(number))
    fast, slow = model.snapshot(), {key: value.clone() for key, value in method.slow.items()}
    memory = method.end_task(context)
    answering, other = (slow, fast) if answers == "slow" else (fast, slow)
    assert all(model.snapshot()[key].equal(answering[key]) for key in fast)
    assert all(memory.tensors[OTHER + key].equal(other[key]) for key in fast)
    assert not flat(list(fast.values())).equal(flat(list(slow.values())))
    snapshot = model.snapshot()
    method.install([StoredTask(0, "task0", memory, lambda: snapshot)])
    second = task(model, 1, rows(6, 1))
    method.begin_task(second)
    assert all(model.snapshot()[key].equal(fast[key]) for key in fast)
    assert all(method.slow[key].equal(slow[key]) for key in slow)
    assert method.drawn == 3  # six rows in two steps an epoch
    assert method.rows.rows == rows(6, 0)
    memory = method.end_task(second)
    held = reservoir(rows(6, 0), 6, rows(6, 1), 8, second.seed)
    assert Memory.from_tensors(memory.tensors, "task1").rows == held
    assert len(held) == 8
    assert memory.info == {"rows_seen": 12, "steps_averaged": 3}


def test_a_resumed_task_ends_in_the_same_bytes(tiny_model: Path) -> None:
    method = start(ILora, tiny_model, {"decay": 0.7})
    model = method.model
    stored = [learn(method, 0), learn(method, 1)]
    context = task(model, 2, rows(6, 2))

    def walk(method: ILora, numbers: range) -> None:
        for number in numbers:
            give_gradients(model, number)
            method.after_backward(step(number))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            method.after_step(step(number))

    method.begin_task(context)
    walk(method, range(2))
    middle, (tensors, values) = model.snapshot(), method.state()
    tensors = {key: value.clone() for key, value in tensors.items()}
    values = json.loads(json.dumps(values))
    walk(method, range(2, STEPS))
    memory, straight = method.end_task(context), model.snapshot()

    again = meet(ILora, model, SECTION, {"decay": 0.7})
    again.restore(stored)
    again.install(stored)
    again.begin_task(context)
    model.restore(middle)
    again.load_state(tensors, values)
    walk(again, range(2, STEPS))
    resumed = again.end_task(context)
    assert all(model.snapshot()[key].equal(straight[key]) for key in straight)
    assert resumed.info == memory.info
    assert all(resumed.tensors[key].equal(memory.tensors[key]) for key in memory.tensors)


def test_what_is_missing_or_cannot_be_compared_is_said(tiny_model: Path, monkeypatch) -> None:
    method = start(ILora, tiny_model)
    stored = learn(method, 0)
    with pytest.raises(RunDirError, match="steps_averaged"):
        method.restore([StoredTask(0, "x", TaskMemory(stored.memory.tensors, {"rows_seen": 1}))])
    with pytest.raises(RunDirError, match="rows of task x"):
        method.restore([StoredTask(0, "x", TaskMemory({}, stored.memory.info))])
    rest = {k: v for k, v in stored.memory.tensors.items() if not k.startswith(OTHER)}
    with pytest.raises(RunDirError, match="second adapter"):
        method.restore([StoredTask(0, "x", TaskMemory(rest, stored.memory.info))])
    monkeypatch.setattr(type(method.model.backbone.model), "get_output_embeddings", lambda _: None)
    with pytest.raises(UsageError, match="output layer reads"):
        meet(ILora, method.model, SECTION)
    meet(ILora, method.model, SECTION, {"compare": "logits"})


def test_hidden_states_are_the_same_where_a_model_computes_all_logits(
    tiny_model: Path, monkeypatch
) -> None:
    model = start(ILora, tiny_model).model
    batch = collate(rows(4, 0), 0)
    hidden, logits = answer_hidden(model, batch)
    monkeypatch.setattr(forward, "forward_parameters", lambda _: frozenset())
    for found, wanted in zip(answer_hidden(model, batch), (hidden, logits), strict=True):
        torch.testing.assert_close(found, wanted)
    assert hidden.shape == (len(batch.labels), 32)
