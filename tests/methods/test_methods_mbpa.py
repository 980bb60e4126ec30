"""MbPA++: neighbours by brute force, the local steps by torch's own SGD, and no trace of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rows_support import flat, move, rows, start, step, task

from treelora_cli.errors import RunDirError
from treelora_cli.methods.base import StoredTask
from treelora_cli.methods.mbpa import KEYS, LocalAdaptation, Mbpa
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder, Example
from treelora_cli.models.features import prompt_features
from treelora_cli.models.generate import generate
from treelora_cli.models.likelihood import choose_batches
from treelora_cli.recipe import LoraSection

SETTINGS = {"neighbours": 3, "steps": 4, "rate": 0.5, "anchor": 0.3}
TEXTS = [f"question {n}: what comes after {n * 37}? Answer:" for n in range(12)]


def encoder_of(model: AdaptedModel) -> Encoder:
    return Encoder(model.backbone.tokenizer, 64, 8, encodes=model.backbone.encodes)


def examples(model: AdaptedModel, texts: Sequence[str] = TEXTS) -> list[Example]:
    encoder = encoder_of(model)
    return [encoder.example(text, f"it is {n * 5}") for n, text in enumerate(texts)]


def learn(method: Mbpa, index: int, some: Sequence[Example]) -> StoredTask:
    context = task(method.model, index, some)
    method.begin_task(context)
    memory, answer = method.end_task(context), method.model.answer()
    return StoredTask(index, context.name, memory, lambda: answer)


def learned(folder: Path, **settings: object) -> Mbpa:
    """A method with weights of its own and two tasks in its memory."""
    method = start(Mbpa, folder, SETTINGS | settings)
    move(method.model, 1)
    rows = examples(method.model)
    method.install([learn(method, index, rows[6 * index :][:6]) for index in range(2)])
    return method


def ids_of(model: AdaptedModel, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A question's tokens with padding around it, as on either kind of model it may stand."""
    tokens = encoder_of(model).prompt(text)[0]
    left, right = (0, 2) if model.backbone.encodes else (2, 0)
    padded = [0] * left + tokens + [0] * right
    mask = [0] * left + [1] * len(tokens) + [0] * right
    return torch.tensor([padded]), torch.tensor([mask])


def loss_alone(model: AdaptedModel, some: Sequence[Example]) -> torch.Tensor:
    """The mean over answer tokens, row by row, without padding or our batches."""
    total, count = torch.zeros(()), 0
    for row in some:
        prompt, answer = row.tokens[: row.answer_start], row.tokens[row.answer_start :]
        if row.apart:
            given = torch.tensor([[0, *answer[:-1]]])
            logits = model.peft(input_ids=torch.tensor([prompt]), decoder_input_ids=given).logits[0]
        else:
            logits = model.peft(input_ids=torch.tensor([row.tokens])).logits[0]
            logits = logits[row.answer_start - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="sum"
        )
        count += len(answer)
    return total / count


@pytest.fixture(params=["tiny_model", "tiny_t5"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_neighbours_are_those_of_brute_force(folder: Path) -> None:
    method = learned(folder)
    model, encoder = method.model, encoder_of(method.model)
    keys = np.stack([prompt_features(model, encoder, [text])[0].numpy() for text in TEXTS])
    for text in ("question 3: what comes after 112? Answer:", "who are you?", TEXTS[7]):
        key = prompt_features(model, encoder, [text])[0].numpy()
        distances = [float(((one - key) ** 2).sum()) for one in keys]
        nearest = sorted(range(len(TEXTS)), key=distances.__getitem__)[:3]
        found = method.local.nearest(encoder.prompt(text)[0])
        assert found == [examples(model)[at] for at in nearest]


def test_the_local_steps_are_sgd_on_loss_and_anchor(folder: Path) -> None:
    method = learned(folder)
    model, text = method.model, "question 3: what comes after 112? Answer:"
    trained = [p.detach().clone() for p in model.parameters()]
    near = method.local.nearest(encoder_of(model).prompt(text)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        pairs = zip(model.parameters(), trained, strict=True)
        pull = torch.stack([(p - before).square().sum() for p, before in pairs]).sum()
        optimizer.zero_grad()
        (loss_alone(model, near) + 0.3 * pull).backward()
        optimizer.step()
    expected = flat(model.parameters())
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), trained, strict=True):
            parameter.copy_(before)
    with torch.inference_mode(), method.local.answering(*ids_of(model, text)):
        found = flat(model.parameters()).clone()
    assert float((found - flat(trained)).abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_no_trace_is_left(folder: Path) -> None:
    method = learned(folder)
    model = method.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    before, random = model.snapshot(), torch.get_rng_state()
    flags = [p.requires_grad for p in model.peft.parameters()]
    for fails in (False, True):
        try:
            with torch.inference_mode(), method.local.answering(*ids_of(model, "who are you?")):
                assert any(not torch.equal(model.snapshot()[key], before[key]) for key in before)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            pass
        assert all(torch.equal(value, before[key]) for key, value in model.snapshot().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in model.peft.parameters()] == flags
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not optimizer.state
    assert model.condition is method.local
    loss = loss_alone(model, examples(model)[:1])
    loss.backward()  # the weights are still leaves that a graph can be made of


def test_answers_are_those_of_the_adapted_model(folder: Path) -> None:
    """Whatever is asked with them, greedily and by likelihood, and not those of the trained one."""
    method = learned(folder, rate=2.0, steps=6)
    model, encoder = method.model, encoder_of(method.model)
    asked = TEXTS[3:6]
    together = generate(model, encoder, asked, 8, 64)
    labels = [f"it is {n * 5}" for n in range(12)]
    ways = (model, encoder, asked, labels, "", 64)
    chosen = {k: v for batch in choose_batches(*ways) for k, v in batch.items()}
    apart, picked = [], []
    for text in asked:
        with method.local.answering(*ids_of(model, text)):
            model.condition = None
            apart += generate(model, encoder, [text], 8, 1)
            one = (model, encoder, [text], labels, "", 1)
            picked += [batch[0] for batch in choose_batches(*one)]
            model.condition = method.local
    assert together == apart
    assert [chosen[n] for n in range(3)] == picked
    model.condition = None
    plain = generate(model, encoder, asked, 8, 64)
    assert plain != together
    with model.as_base():
        assert model.condition is None


def test_no_adaptation_without_rows_or_steps(tiny_model: Path) -> None:
    for method in (start(Mbpa, tiny_model, SETTINGS), learned(tiny_model, steps=0)):
        before = method.model.snapshot()
        with method.local.answering(*ids_of(method.model, "who are you?")):
            now = method.model.snapshot()
            assert all(torch.equal(value, before[key]) for key, value in now.items())
    with pytest.raises(ValueError, match="2 questions at once"):  # noqa: SIM117
        with method.local.answering(torch.ones(2, 3), torch.ones(2, 3)):
            pass


def test_replay_is_sparse(tiny_model: Path) -> None:
    method = start(Mbpa, tiny_model, {"every": 3})
    first, second = rows(5, 1), rows(8, 2)
    method.begin_task(task(method.model, 0, first))
    assert method.penalty(step(0)) is None
    method.install([learn(method, 0, first)])
    context = task(method.model, 1, second)
    method.begin_task(context)
    joined = [method.penalty(step(number)) for number in range(7)]
    assert [one is not None for one in joined] == [True, False, False, True, False, False, True]
    # A step has four rows of its own; five are kept, so that four are drawn.
    means = {
        left: context.ask.loss([row for at, row in enumerate(first) if at != left]).item()
        for left in range(5)
    }
    for loss in (joined[0], joined[3], joined[6]):
        assert loss is not None
        assert min(abs(loss.item() - mean) for mean in means.values()) < 1e-5


def test_a_method_with_only_the_run_directory_answers_the_same(tiny_model: Path) -> None:
    method = start(Mbpa, tiny_model, SETTINGS | {"memory": 0.5})
    move(method.model, 1)
    stored = [learn(method, index, examples(method.model)[6 * index :][:6]) for index in range(2)]
    assert [task.memory.info["rows_kept"] for task in stored] == [3, 3]
    method.install(stored)
    again = Mbpa(method.settings)
    again.start(method.stream, method.model)
    again.install(stored)
    assert again.local.memory == method.local.memory
    assert torch.equal(again.local.keys, method.local.keys)
    assert isinstance(method.model.condition, LocalAdaptation)
    again.install(stored[:1])
    assert len(again.local.memory) == len(again.local.keys) == 3


def test_keys_that_are_gone_are_missed(tiny_model: Path) -> None:
    method = start(Mbpa, tiny_model, SETTINGS)
    stored = learn(method, 0, examples(method.model)[:4])
    for keys in ({}, {KEYS: stored.memory.tensors[KEYS][:2]}):
        tensors = {k: v for k, v in stored.memory.tensors.items() if k != KEYS} | keys
        with pytest.raises(RunDirError, match="keys of task task0"):
            method.install([replace(stored, memory=replace(stored.memory, tensors=tensors))])


def test_keys_do_not_change_with_training(tiny_model: Path) -> None:
    method = start(Mbpa, tiny_model, SETTINGS, targets="all-linear", dropout=0.1)
    assert isinstance(method.stream.lora, LoraSection)
    some = examples(method.model)[:4]
    before = learn(method, 0, some).memory.tensors[KEYS]
    move(method.model, 5, 1.0)
    assert torch.equal(learn(method, 1, some).memory.tensors[KEYS], before)
