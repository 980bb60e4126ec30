"""HiDe's contrast against numpy on states that transformers itself gives; its two forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conditions_support import batch_of, learn
from rows_support import meet, move, rows, start, task

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import StepContext
from treelora_cli.methods.hide import Hide, contrast, first_answers
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch, Example, pack
from treelora_cli.models.forward import answer_logits, answer_loss_of
from treelora_cli.recipe import LoraSection

BASES = pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])


def contrast_by_hand(rows: np.ndarray) -> float:
    total = 0.0
    for at, row in enumerate(rows):
        scores = [row @ other / 0.8 for other in rows]
        total -= scores[at] - np.log(np.sum(np.exp(scores)))
    return total / len(rows)


def state_by_hand(method: Hide, example: Example) -> np.ndarray:
    """The unit state that the output layer turns into the first answer token, read alone."""
    prompt = torch.tensor([example.tokens[: example.answer_start]])
    if example.apart:
        out = method.model.peft(
            input_ids=prompt, decoder_input_ids=torch.tensor([[0]]), output_hidden_states=True
        )
        state = out.decoder_hidden_states[-1][0, -1]
    else:
        out = method.model.peft(input_ids=prompt, output_hidden_states=True)
        state = out.hidden_states[-1][0, -1]
    found = state.detach().double().numpy()
    return found / np.sqrt(found @ found)


def read(method: Hide, batch: Batch) -> tuple[StepContext, torch.Tensor]:
    logits = answer_logits(method.model, batch)
    context = StepContext(0, torch.tensor(1.0), batch=batch, logits=logits)
    return context, answer_loss_of(logits, batch)


@BASES
@pytest.mark.parametrize("uneven", [False, True], ids=["indices", "mask"])
def test_the_penalty_is_the_contrast_of_states_and_means(request, base: str, uneven: bool) -> None:
    method = start(Hide, request.getfixturevalue(base), {"weight": 0.7}, targets="all-linear")
    apart = base == "tiny_t5"
    examples = rows(3, 5, apart=apart) if uneven else rows(9, 5, apart=apart)[1::3]
    batch = batch_of(examples)
    if not apart:
        assert (batch.kept.dtype == torch.bool) == uneven
    method.begin_task(task(method.model, 0, examples))
    move(method.model, 2, 0.3)
    states = np.stack([state_by_hand(method, example) for example in examples])
    context, _ = read(method, batch)
    assert method.penalty(context).item() == pytest.approx(0.7 * contrast_by_hand(states), rel=1e-4)
    memory = method.end_task(task(method.model, 0, examples))
    assert not method.head._forward_pre_hooks, "nothing is watched between tasks"
    mean = states.mean(0) / np.linalg.norm(states.mean(0))
    np.testing.assert_allclose(memory.tensors["mean"].numpy(), mean, rtol=1e-3, atol=1e-5)
    method.begin_task(task(method.model, 1, examples))
    move(method.model, 3, 0.3)
    states = np.stack([state_by_hand(method, example) for example in examples])
    context, loss = read(method, batch)
    penalty = method.penalty(context)
    expected = 0.7 * contrast_by_hand(np.stack([mean, *states]))
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    (loss + penalty).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.model.parameters())


def test_descent_drives_states_from_earlier_means(tiny_model: Path) -> None:
    """One row at a time: then there is nothing but the means that it can be driven from."""
    method = start(Hide, tiny_model, {"weight": 1.0}, targets="all-linear")
    examples = rows(1, 5)
    learn(method, [], examples, 0.01)
    method.begin_task(task(method.model, 1, examples))
    move(method.model, 3, 0.01)
    optimizer = torch.optim.Adam(method.model.parameters(), 1e-2)
    nearness = []
    for _ in range(20):
        context, _ = read(method, batch_of(examples))
        nearness.append((method.states.of(context.batch) @ method.means[0]).item())
        optimizer.zero_grad()
        method.penalty(context).backward()
        optimizer.step()
    assert nearness[0] > 0.9
    assert nearness[-1] < 0


def test_first_answers_of_both_layouts() -> None:
    def batch(kept: torch.Tensor | None, labels: int, count: int = 3) -> Batch:
        ids = torch.zeros(count, 9, dtype=torch.int64)
        return Batch(ids, None, kept, torch.zeros(labels, dtype=torch.int64), 0, 0)

    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 2:4], mask[1, 3:8], mask[2, 1:2] = True, True, True
    assert first_answers(batch(mask, 8)).tolist() == [0, 2, 7]
    assert first_answers(batch(torch.zeros(3, 4, dtype=torch.int64), 12)).tolist() == [0, 4, 8]
    assert first_answers(batch(None, 6)).tolist() == [0, 2, 4]


def test_packed_rows_are_refused(tiny_model: Path) -> None:
    method = start(Hide, tiny_model)
    method.begin_task(task(method.model, 0, rows(2, 1)))
    context, _ = read(method, pack(rows(2, 1), 0))
    with pytest.raises(UsageError, match=r"optim\.packing"):
        method.penalty(context)


def test_every_task_starts_anew_and_means_come_back_from_disk(tiny_model: Path) -> None:
    method = start(Hide, tiny_model)
    assert method.mode == "route"
    finished: list = []
    fresh = method.model.snapshot()
    for index in range(2):
        learn(method, finished, rows(70, index)[5 * index : 5 * index + 3])
    assert not all(torch.equal(value, fresh[key]) for key, value in method.model.snapshot().items())
    method.begin_task(task(method.model, 2, rows(2, 2)))
    assert all(torch.equal(value, fresh[key]) for key, value in method.model.snapshot().items())
    section = LoraSection(rank=3, alpha=6, dropout=0.0)
    again = meet(Hide, AdaptedModel(method.model.backbone, section, 0), section)
    again.restore(finished)
    assert [torch.equal(*pair) for pair in zip(again.means, method.means, strict=True)] == [
        True
    ] * 2
    assert method.means[0].norm().item() == pytest.approx(1)


def test_the_released_form_is_a_contrast_of_the_rows_of_A(tiny_model: Path) -> None:
    method = start(Hide, tiny_model, {"form": "contrastive"})
    assert method.mode == "latest"
    assert Hide.mode == "route", "a setting of one run is not everybody's"
    finished: list = []
    stored = learn(method, finished, rows(3, 1), 0.3)
    assert stored.memory.tensors == {}
    before = method.model.snapshot()
    method.begin_task(task(method.model, 1, rows(3, 1)))
    after = method.model.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before), "it goes on"
    A = [value.double().numpy() for key, value in after.items() if ".lora_A." in key]
    penalty = method.penalty(read(method, batch_of(rows(3, 1)))[0])
    expected = 0.5 * sum(contrast_by_hand(matrix) for matrix in A)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for key, parameter in method.model.live_parameters.items():
        assert (parameter.grad is not None) == (".lora_A." in key)


def test_at_most_so_many_rows_make_a_mean(tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr("treelora_cli.methods.hide.ROWS", 4)
    method = start(Hide, tiny_model)
    examples = rows(10, 1)
    context = task(method.model, 0, examples)
    method.begin_task(context)
    mean = np.mean([state_by_hand(method, examples[at]) for at in (0, 2, 5, 7)], axis=0)
    found = method.end_task(context).tensors["mean"].numpy()
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-3, atol=1e-5)


def test_contrast_of_one_row_is_nothing() -> None:
    assert contrast(torch.randn(1, 5)).item() == 0
