"""EWC: Fisher information row by row and from Jacobians, its penalty as a sum over tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradient_support import (
    LORA,
    answer_tokens,
    finish,
    live_model,
    row_gradients,
    task_rows,
    weights,
)
from rows_support import flat, meet, move, step, task
from torch.nn.utils import vector_to_parameters

from treelora_cli.errors import RunDirError
from treelora_cli.methods._anchor import Anchor
from treelora_cli.methods._fisher import fisher_diagonal
from treelora_cli.methods.ewc import Ewc
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import pack
from treelora_cli.models.probe import Probe


@pytest.fixture(params=["causal", "t5"])
def either(request, tiny_model: Path, tiny_t5: Path) -> AdaptedModel:
    return moved(tiny_model if request.param == "causal" else tiny_t5)


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    return moved(tiny_model)


def moved(folder: Path) -> AdaptedModel:
    found = live_model(folder)
    move(found, 1, 0.3)
    return found


def by_rows(model: AdaptedModel, index: int = 0) -> torch.Tensor:
    """The empirical Fisher of a task's rows, from one backward pass a row."""
    rows = task_rows(model, index)
    return (row_gradients(model, rows) ** 2).sum(dim=0) / answer_tokens(rows)


def test_the_empirical_fisher_is_that_of_single_rows(either: AdaptedModel) -> None:
    rows = task_rows(either, 0)
    found = fisher_diagonal(either, task(either, 0, rows).ask, rows, "data", 1)
    expected = by_rows(either)
    assert float(expected.max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in either.parameters())


def test_rows_are_told_apart_in_packed_batches_and_other_parameters(model: AdaptedModel) -> None:
    rows = task_rows(model, 0)
    expected = by_rows(model)
    packed = Probe(model, lambda some: [pack(list(some), 0)])
    found = fisher_diagonal(model, packed, rows, "data", 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    model.add_part("more", torch.ones(3))  # no weight of a layer, and not in the loss
    found = fisher_diagonal(model, task(model, 0, rows).ask, rows, "data", 1)
    wanted = torch.cat([expected, torch.zeros(3)])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_a_layer_that_is_used_twice_is_not_squared_use_by_use(model: AdaptedModel) -> None:
    """The gradient of a row is the sum over both uses, and is squared as a whole."""
    blocks = model.peft.get_base_model().model.layers
    kept, blocks[1] = blocks[1], blocks[0]
    for parameter in kept.parameters():
        parameter.requires_grad_(False)
    rows = task_rows(model, 0)
    found = fisher_diagonal(model, task(model, 0, rows).ask, rows, "data", 1)
    torch.testing.assert_close(found, by_rows(model), rtol=1e-3, atol=1e-7)


def test_answers_drawn_from_the_model_give_the_fisher_information(model: AdaptedModel) -> None:
    """Its definition, E[(d log p)^2] over the whole vocabulary, against 1500 drawn answers."""
    with torch.no_grad():  # else all answers are about equally likely
        model.peft.get_base_model().get_output_embeddings().weight.mul_(20)
    row = task_rows(model, 0)[1]
    start, parameters = row.answer_start, model.parameters()
    logits = model.peft(input_ids=torch.tensor([row.tokens])).logits[0, start - 1 : -1]
    exact = torch.zeros(model.trainable_count())
    for at in range(len(logits)):
        p = torch.softmax(logits[at].detach(), dim=-1)
        parts = torch.autograd.grad(
            logits[at], parameters, torch.eye(len(p)), retain_graph=True, is_grads_batched=True
        )
        jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)  # [vocabulary, P]
        exact += (p[:, None] * (jacobian - p @ jacobian) ** 2).sum(dim=0)
    exact /= len(logits)
    rows = [row] * 1500
    found = fisher_diagonal(model, task(model, 0, rows).ask, rows, "model", 3)
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=0.05)
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.995
    data = fisher_diagonal(model, task(model, 0, rows).ask, rows, "data", 3)
    assert float(torch.cosine_similarity(data, exact, dim=0)) < 0.9
    again = [
        fisher_diagonal(model, task(model, 0, rows).ask, rows[:4], "model", s) for s in (3, 3, 4)
    ]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_a_sum_of_anchors_is_the_sum_of_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    weigh = [torch.rand(40, generator=generator) for _ in range(4)]
    weigh[0][:5] = weigh[1][:5] = weigh[2][:5] = 0  # weighed by the last alone
    weigh[3][5:10] = 0
    for values in weigh:
        values[10:12] = 0  # by none
    centres = [torch.randn(40, generator=generator) for _ in range(4)]
    total = Anchor.of(weigh[0], centres[0])
    for w, c in zip(weigh[1:], centres[1:], strict=True):
        total = total.plus(Anchor.of(w, c))
    for _ in range(3):
        theta = torch.randn(40, generator=generator, requires_grad=True)
        pairs = zip(weigh, centres, strict=True)
        expected = sum((w.double() * (theta - c).double() ** 2).sum() for w, c in pairs)
        assert total.value(theta).item() == pytest.approx(expected.item(), rel=1e-5)
        slope = torch.autograd.grad(total.value(theta), theta)[0]
        wanted = torch.autograd.grad(expected, theta)[0]
        torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("online", [False, True])
def test_the_penalty_is_half_lambda_times_the_sum_over_tasks(
    model: AdaptedModel, online: bool
) -> None:
    settings = {"lambda": 3.0, "fisher": "data", "online": online, "decay": 0.5}
    method = meet(Ewc, model, LORA, settings)
    fishers, ends = [], []
    for index in range(3):
        context = task(model, index, task_rows(model, index))
        method.begin_task(context)
        if index == 0:
            assert method.penalty(step()) is None
        move(model, index, 0.1)
        memory = method.end_task(context)
        assert memory.info["fisher_rows"] == 6
        fishers.append(by_rows(model, index).double())
        ends.append(weights(model).double())
        assert memory.info["fisher_mean"] == pytest.approx(float(fishers[-1].mean()), rel=1e-3)
    method.begin_task(task(model, 3, []))
    move(model, 9, 0.1)
    theta = weights(model).double()
    if online:
        held = 0.25 * fishers[0] + 0.5 * fishers[1] + fishers[2]
        expected = 1.5 * (held * (theta - ends[2]) ** 2).sum()
        slope = 3.0 * held * (theta - ends[2])
    else:
        both = list(zip(fishers, ends, strict=True))
        expected = 1.5 * sum((f * (theta - end) ** 2).sum() for f, end in both)
        slope = 3.0 * sum(f * (theta - end) for f, end in both)
    value = method.penalty(step())
    assert float(value) == pytest.approx(float(expected), rel=1e-3)
    value.backward()
    found = flat([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found.double(), slope, rtol=2e-3, atol=1e-6)


def test_with_lambda_one_it_foretells_what_the_old_loss_rises_by(model: AdaptedModel) -> None:
    """Where the model's answers are the data's, the Fisher is the Hessian of the mean loss."""
    row = task_rows(model, 0)[1]
    rows = [row] * 400
    method = meet(Ewc, model, LORA, {"lambda": 1.0, "rows": 400})
    context = task(model, 0, rows)
    method.begin_task(context)
    method.end_task(context)
    method.begin_task(task(model, 1, []))
    at, generator = weights(model), torch.Generator().manual_seed(5)
    tokens, start = torch.tensor([row.tokens]), row.answer_start

    def answers() -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(
                model.peft(input_ids=tokens).logits[0, start - 1 : -1].double(), -1
            )

    before = answers()
    rises, penalties = [], []
    for _ in range(30):
        # One entry at a time: off the diagonal nothing is known.
        change = torch.zeros_like(at)
        change[torch.randint(len(at), (), generator=generator)] = 0.2
        vector_to_parameters(at + change, model.parameters())
        rises.append(float((before.exp() * (before - answers())).sum(dim=-1).mean()))
        penalties.append(float(method.penalty(step())))
    assert sum(penalties) == pytest.approx(sum(rises), rel=0.25)


def test_what_is_stored_gives_the_same_penalty_to_the_bit(model: AdaptedModel) -> None:
    for settings in ({}, {"online": True, "decay": 0.9}):
        method = meet(Ewc, model, LORA, settings)
        stored = finish(method, model, 3)
        again = meet(Ewc, model, LORA, settings)
        again.restore(stored)
        values = []
        for one in (method, again):
            one.begin_task(task(model, 3, []))
            values.append(one.penalty(step()))
        move(model, 8, 0.1)
        values += [one.penalty(step()) for one in (method, again)]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[2], values[3])
        assert 0 <= float(values[0]) < float(values[2])


def test_another_models_penalty_is_refused(model: AdaptedModel) -> None:
    method = meet(Ewc, model, LORA)
    stored = finish(method, model, 1)
    whole = dict(stored[0].memory.tensors)
    again = meet(Ewc, model, LORA)
    for name, value in (("anchor.weight", whole["anchor.weight"][1:]), ("anchor.floor", None)):
        tensors = stored[0].memory.tensors
        tensors.clear()
        tensors.update(whole | {name: value})
        if value is None:
            del tensors[name]
        with pytest.raises(RunDirError, match="stored after task task0"):
            again.restore(stored)
