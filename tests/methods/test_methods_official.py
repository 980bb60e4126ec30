"""The released TreeLoRA on a live model: loss, gradient, epochs, checkpoints, draws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.training import TaskTrainer
from treelora_cli.errors import DivergedError, RunDirError, UsageError
from treelora_cli.methods.base import StepContext, StoredTask, StreamContext, TaskContext
from treelora_cli.methods.treelora_official import OfficialSettings, TreeLoraOfficial
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, Example
from treelora_cli.models.forward import answer_loss
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, OptimSection, TreeSection
from treelora_cli.tree.official import OfficialSearch

ROUNDS = 8


def load(tiny_model: Path, *targets: str) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    lora = LoraSection(rank=4, dropout=0.0, targets=targets or "auto")
    return AdaptedModel(backbone, lora, 0)


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    return load(tiny_model)


def make(model: AdaptedModel, reg: float = 0.5) -> TreeLoraOfficial:
    method = TreeLoraOfficial(OfficialSettings(reg=reg))
    method.start(StreamContext(7, BanditSection(), TreeSection()), model)
    return method


def task(index: int, epochs: int = 1, forwards: int = 2) -> TaskContext:
    """A task of ``ROUNDS`` forward passes an epoch, so many a step."""
    steps = ROUNDS // forwards
    return TaskContext(index, f"task{index}", epochs * steps, steps, 100 + index, ROUNDS)


def move(model: AdaptedModel, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def rows(model: AdaptedModel) -> torch.Tensor:
    """The A matrices as rows, found by name and not by the method's own way."""
    named = [p for name, p in model.peft.named_parameters() if ".lora_A." in name]
    return torch.stack([parameter.reshape(-1) for parameter in named])


def walk(method: TreeLoraOfficial, model: AdaptedModel, steps: range, forwards: int = 2) -> list:
    """Go through some steps as the engine does, moving the weights between them."""
    seen = []
    for step in steps:
        for forward in range(forwards):
            value = method.penalty(StepContext(step, torch.tensor(2.0), forward, forwards))
            seen.append(None if value is None else value.item())
        seen.append(method.after_step(StepContext(step, torch.tensor(2.0))))
        move(model, 900 + step, 0.01)
    return seen


def train(method: TreeLoraOfficial, model: AdaptedModel, count: int) -> list[StoredTask]:
    stored = []
    for index in range(count):
        context = task(index)
        method.begin_task(context)
        move(model, index)
        walk(method, model, range(context.steps))
        stored.append(StoredTask(index, context.name, method.end_task(context)))
    return stored


def test_what_is_stored_is_the_scaled_sum_of_the_last_epoch(model: AdaptedModel) -> None:
    method = make(model)
    context = task(0, epochs=2)
    method.begin_task(context)
    total = torch.zeros_like(rows(model))
    for step in range(context.steps):
        if step == context.steps_per_epoch:
            total.zero_()
        for forward in range(2):
            assert method.penalty(StepContext(step, torch.tensor(1.0), forward, 2)) is None
            total += rows(model).detach()
        assert method.after_step(StepContext(step, torch.tensor(1.0))) == {}
        move(model, step)
    record = method.end_task(context).tree
    expected = total * (len(total) / ROUNDS)
    torch.testing.assert_close(record.tensors["values"].view_as(expected), expected)
    assert record.document["tasks"] == ["task0"]


def examples(model: AdaptedModel) -> list[Example]:
    encoder = Encoder(model.backbone.tokenizer, 64, 8, "left", model.backbone.positions)
    answers = ["yes", "no, not at all", "A", "maybe so", "B", "yes and no"]
    return [encoder.example(f"question {n}: ?", text, " ") for n, text in enumerate(answers)]


def test_the_engine_adds_it_to_every_forward_pass(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's gradient is that of sum share (loss - loss' reg t/T rho/(rho + 1e-5)')."""
    method, drawn, gradients = make(model, reg=0.8), [], []
    train(method, model, 3)
    stored = method.stored.clone()
    draw = OfficialSearch.draw

    def record(search: OfficialSearch, *arguments: object) -> torch.Tensor:
        drawn.append(draw(search, *arguments))
        return drawn[-1]

    monkeypatch.setattr(OfficialSearch, "draw", record)
    after_backward = [method.after_backward]

    def keep(step: StepContext) -> None:
        gradients.append([p.grad.clone() for p in model.parameters()])
        after_backward[0](step)

    monkeypatch.setattr(method, "after_backward", keep)
    given = examples(model)
    optim = OptimSection(lr=1e-3, batch_size=4, micro_batch_size=2, grad_clip=0, epochs=2)
    plan = BatchPlan(len(given), 4, 2, 5)
    forwards = Forwards(given, plan, optim, 0)
    rounds = forwards.per_epoch()
    assert rounds == 3  # rows 2 + 2, then 2
    context = TaskContext(3, "task3", plan.steps, plan.steps_per_epoch, 11, rounds)
    method.begin_task(context)
    trainer = TaskTrainer(model, method, context, forwards, optim)
    weights, results = [model.snapshot()], []
    trainer.run(results.append, lambda: weights.append(model.snapshot()))

    at = 0
    for step in range(plan.steps):
        model.restore(weights[step])
        model.peft.zero_grad()
        batches = forwards.of(step)
        assert sorted(batch.input_ids.shape[0] for batch in batches) == [2] * len(batches)
        tokens = sum(batch.answer_tokens for batch in batches)
        whole, penalty = torch.zeros(()), 0.0
        for batch in batches:
            loss = answer_loss(model, batch) / batch.answer_tokens
            live, t = rows(model), at % rounds
            targets = torch.stack([stored[k, n] for n, k in enumerate(drawn[at].tolist())])
            rho = -(live * targets).sum()
            taken = loss.detach() * 0.8 * t / rounds * rho / (rho.detach() + 1e-5)
            whole = whole + (loss - taken) * batch.answer_tokens / tokens
            penalty -= taken.item() * batch.answer_tokens / tokens
            at += 1
        whole.backward()
        assert results[step].penalty == pytest.approx(penalty, rel=1e-4)
        assert results[step].loss + results[step].penalty == pytest.approx(whole.item(), rel=1e-4)
        for found, parameter in zip(gradients[step], model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-7)
    assert at == 6
    assert results[0].penalty != 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_checkpoint_inside_a_task_goes_on_as_if_nothing_had_been(
    model: AdaptedModel, epochs: int
) -> None:
    method = make(model)
    stored = train(method, model, 4)
    context = task(4, epochs)
    method.begin_task(context)
    walk(method, model, range(3))
    middle, saved = model.snapshot(), method.state()
    tail = walk(method, model, range(3, context.steps))
    last = method.end_task(context)

    again = make(model)
    again.restore(stored)
    again.begin_task(context)
    again.load_state(*saved)
    tensors, values = again.state()
    assert tensors.keys() == saved[0].keys()
    assert all(value.equal(saved[0][key]) for key, value in tensors.items())
    assert values == saved[1]
    model.restore(middle)
    assert walk(again, model, range(3, context.steps)) == tail
    memory = again.end_task(context)
    assert memory.info == last.info
    assert memory.tree.document == last.tree.document
    assert memory.tree.tensors["values"].equal(last.tree.tensors["values"])


def test_arms_are_close_to_uniform_however_near_a_task_is(model: AdaptedModel) -> None:
    """The documented oddity: task 3 is where the weights are, and it is drawn no more often."""
    method = make(model)
    train(method, model, 4)
    context = TaskContext(4, "task4", 300, 300, 1, 300)
    method.begin_task(context)
    walk(method, model, range(300), forwards=1)
    pulls = method.end_task(context).info["bandit"][0]["pulls"]
    assert sum(pulls) == 300 * 4
    assert max(pulls) < math.e * min(pulls), pulls
    assert pulls[3] < 0.4 * sum(pulls)


def test_matrices_of_unequal_size_are_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(UsageError) as raised:
        make(load(tiny_model, "q_proj", "down_proj"))
    assert "mlp.down_proj has 256" in raised.value.message
    assert "self_attn.q_proj has 128" in raised.value.message


def test_what_is_stored_must_be_of_this_model(model: AdaptedModel, tiny_model: Path) -> None:
    stored = train(make(model), model, 1)
    with pytest.raises(RunDirError, match="not of this model's shape"):
        make(load(tiny_model, "q_proj")).restore(stored)
    bare = StoredTask(0, "task0", type(stored[0].memory)())
    with pytest.raises(RunDirError, match="no tree"):
        make(model).restore([bare])


def test_weights_that_are_not_finite_are_told(model: AdaptedModel) -> None:
    method = make(model)
    train(method, model, 2)
    method.begin_task(task(2))
    with torch.no_grad():
        method.parameters[0].fill_(torch.inf)
    with pytest.raises(DivergedError, match="not finite"):
        walk(method, model, range(2))
