"""Both arms of a comparison compute the same thing."""

from __future__ import annotations

import pytest
import torch

from treelora_cli.bench.arms import PlainLoop, begin, new_method, task_context
from treelora_cli.bench.data import TaskPlan, arms
from treelora_cli.bench.evaluate import BATCH, Questions
from treelora_cli.bench.memory import balanced_tree, learn_one, remember_many, synthetic_values
from treelora_cli.bench.part import Plan
from treelora_cli.bench.shapes import TINY, Rows, SameRows, build, number_tokenizer, random_examples
from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.forward import answer_loss
from treelora_cli.recipe import OptimSection
from treelora_cli.tree.serial import from_document, to_document
from treelora_cli.tree.signatures import SignatureBank

CPU = torch.device("cpu")
PLAN = Plan(CPU)
OPTIM = OptimSection(lr=1e-2)
ROWS = Rows(3, 20, 6)


def same_weights(one: AdaptedModel, other: AdaptedModel) -> bool:
    left, right = one.snapshot(), other.snapshot()
    # AdamW's first steps have the size of lr whatever the gradient, so signs of rounding show.
    return all(torch.allclose(left[key], right[key], atol=2e-5) for key in left)


def test_a_seed_gives_the_same_model_twice_and_another_one_does_not() -> None:
    one, other, third = build(TINY, CPU, 0), build(TINY, CPU, 0), build(TINY, CPU, 1)
    for left, right in zip(one.peft.parameters(), other.peft.parameters(), strict=True):
        assert left.equal(right)
    assert not same_weights(one, third)


@pytest.mark.parametrize("name", ["seqlora", "per-task", "joint", "treelora"])
def test_a_first_task_trains_as_plain_peft_does(name: str) -> None:
    examples = ROWS.examples(TINY.vocab, 0)
    plain_model, adapted = build(TINY, CPU, 0), build(TINY, CPU, 0)
    plain = PlainLoop(plain_model, examples, OPTIM)
    forwards = Forwards(examples, SameRows(3, 4), OPTIM, 0)
    method = new_method(name, adapted, 0)
    trainer = begin(method, adapted, task_context(0, forwards, 0, adapted), forwards, OPTIM)
    losses = []
    for _ in range(4):
        plain.step()
        trainer.advance()
        losses.append(float(plain.loss))
    assert trainer.step == 4
    assert losses[3] < losses[0]
    assert same_weights(plain_model, adapted)
    with torch.no_grad():
        engine = answer_loss(adapted, forwards.of(0)[0]) / 18
    plain.step()
    assert float(engine) == pytest.approx(float(plain.loss), rel=1e-5)


def test_the_papers_loop_and_the_engine_take_the_same_steps() -> None:
    lengths = [(5, 3), (30, 2), (12, 9), (7, 1), (20, 20)]
    examples = random_examples(lengths, TINY.vocab, 0)
    papers, trainer = arms(PLAN, TINY, examples, TaskPlan([3, 2], 2))
    before = trainer.adapted.snapshot()
    results = []
    losses = []
    for _ in range(4):
        papers.step()
        losses.append(float(papers.loss))
        results += trainer.advance()
    results += trainer.drain()
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-4)
    for left, right in zip(papers.parameters, trainer.adapted.parameters(), strict=True):
        assert torch.allclose(left, right, atol=2e-5)
    assert any(not before[key].equal(value) for key, value in trainer.adapted.snapshot().items())


def test_a_task_is_never_mixed_with_another_in_a_step() -> None:
    plan = TaskPlan([3, 1, 2], 2)
    assert (plan.steps, plan.steps_per_epoch) == (6, 3)
    assert [plan.rows(step) for step in range(4)] == [[0, 1, 2], [3], [4, 5], [0, 1, 2]]


def test_batched_answers_are_those_of_one_at_a_time() -> None:
    questions = Questions(build(TINY, CPU, 0), [4, 40, 17, 9, 23], 0)
    questions.answer(1)
    questions.answer(BATCH)
    assert questions.equal(1, BATCH) == 5
    assert all(questions.answers[1])
    encoded = [len(questions.encoder.prompt(prompt)[0]) for prompt in questions.prompts]
    assert encoded == [4, 40, 17, 9, 23]


def test_the_tokenizer_reads_numbers_as_tokens() -> None:
    tokenizer = number_tokenizer(64)
    assert tokenizer("17 4 63", add_special_tokens=False)["input_ids"] == [17, 4, 63]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", ["treelora", "treelora-official"])
def test_many_earlier_tasks_are_what_the_method_looks_at(name: str) -> None:
    adapted = build(TINY, CPU, 0)
    examples = ROWS.examples(TINY.vocab, 0)
    _, memory = learn_one(name, adapted, examples, OPTIM, 0)
    method = remember_many(name, adapted, memory, 37, 0)
    forwards = Forwards(examples, SameRows(3, 40), OPTIM, 0)
    trainer = begin(method, adapted, task_context(37, forwards, 0, adapted), forwards, OPTIM)
    for _ in range(3):
        trainer.advance()
    results = trainer.drain()
    assert all(result.penalty is not None for result in results)
    end = method.end_task(trainer.task)
    assert end.tree is not None
    assert len(end.tree.document["tasks"]) == 38
    assert len(end.info["bandit"][0]["pulls"]) == 37


def test_one_earlier_task_is_remembered_by_the_method_that_trained_it() -> None:
    adapted = build(TINY, CPU, 0)
    examples = ROWS.examples(TINY.vocab, 0)
    method, _ = learn_one("treelora", adapted, examples, OPTIM, 0)
    forwards = Forwards(examples, SameRows(3, 4), OPTIM, 0)
    trainer = begin(method, adapted, task_context(1, forwards, 0, adapted), forwards, OPTIM)
    trainer.advance()
    (result,) = trainer.drain()
    assert result.info["arms"] == [0]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_the_balanced_tree_is_a_tree(count: int) -> None:
    tree = balanced_tree(count)
    assert tree.depth == (count - 1).bit_length()
    bank = SignatureBank(
        tuple(f"t{number}" for number in range(count)),
        torch.zeros(count, 4),
        (2, 2),
        torch.zeros(count, 2),
    )
    assert from_document(to_document(tree, bank)).nodes == tree.nodes


def test_synthetic_signatures_lie_about_their_centre_and_repeat() -> None:
    centre = torch.randn(500, generator=torch.Generator().manual_seed(5))
    values = synthetic_values(centre, 300, 7, CPU)
    assert values.equal(synthetic_values(centre, 300, 7, CPU))
    assert not values.equal(synthetic_values(centre, 300, 8, CPU))
    off = (values - centre).std() / centre.std()
    assert float(off) == pytest.approx(0.25, rel=0.02)
    assert len(values.unique(dim=0)) == 300
