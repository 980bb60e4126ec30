"""TreeLoRA's other starts and its literal gradient, each against a plain recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.gradients import first_gradient
from treelora_cli.errors import UsageError
from treelora_cli.methods._starts import GroupStart, group_of, mean_change
from treelora_cli.methods.base import StepContext, StreamContext, TaskContext
from treelora_cli.methods.treelora import TreeLora, TreeLoraSettings
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, collate
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.probe import gradient_under, mean_gradient
from treelora_cli.recipe import (
    BanditSection,
    LoraSection,
    ModelSection,
    OptimSection,
    TreeSection,
)


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    return AdaptedModel(backbone, LoraSection(rank=4, dropout=0.3), 0)


@pytest.fixture
def examples(model: AdaptedModel):
    encoder = Encoder(model.backbone.tokenizer, 40, 10)
    words = ["sky", "红", "groß", "def add", "12", "a", "b", "c"]
    return [encoder.example(f"What is {word}?", f"it is {word}") for word in words]


def move(model: AdaptedModel, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def make(model: AdaptedModel, bandit: dict[str, object] | None = None, **own: object) -> TreeLora:
    method = TreeLora(TreeLoraSettings(**({"form": "subgradient"} | own)))
    method.start(StreamContext(7, BanditSection(**(bandit or {})), TreeSection()), model)
    return method


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4), rank=st.integers(1, 3), seed=st.integers(0, 99),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)  # fmt: skip
def test_mean_change_is_the_best_fit_to_the_dense_mean(count, rank, seed, sizes) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = sizes
    key = "base_model.model.m"
    adapters = [
        {
            f"{key}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
            f"{key}.lora_B.weight": torch.randn(d_out, rank, generator=generator),
        }
        for _ in range(count)
    ]
    found = mean_change(adapters)
    A, B = found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"]
    assert (A.shape, B.shape) == ((rank, d_in), (d_out, rank))
    dense = sum(
        adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
        for adapter in adapters
    ) / count  # fmt: skip
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close((B.double() @ A.double()), best, rtol=1e-4, atol=1e-5)


def test_mean_gradient_is_what_backward_gives_and_leaves_no_trace(model, examples) -> None:
    move(model, 1)
    batches = [collate(examples[:3], 0), collate(examples[3:5], 0)]
    before, state = model.snapshot(), torch.get_rng_state()
    found = mean_gradient(model, batches)
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_rng_state().equal(state)
    tokens = sum(batch.answer_tokens for batch in batches)
    for batch in batches:
        (answer_loss(model, batch) / tokens).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    other = {key: value + 0.01 for key, value in before.items()}
    under = gradient_under(model, batches, other)
    assert all(model.snapshot()[key].equal(before[key]) for key in before)
    model.restore(other)
    for one, two in zip(under, mean_gradient(model, batches), strict=True):
        assert one.equal(two)


def context(model, examples, index: int, first: int) -> TaskContext:
    """A task whose rows are two of the examples."""
    mine = examples[first : first + 2]
    plan = BatchPlan(2, 2, 4, index)

    def probe(steps: int) -> list[torch.Tensor]:
        return first_gradient(model, Forwards(mine, plan, OptimSection(), 0), steps)

    return TaskContext(index, f"task{index}", 4, 1, 100 + index, 1, probe)


def test_fresh_starts_every_task_from_the_common_start(model, examples) -> None:
    start = model.snapshot()
    method = make(model, start="fresh")
    for index in range(3):
        method.begin_task(context(model, examples, index, index))
        assert all(model.snapshot()[key].equal(start[key]) for key in start)
        move(model, index)
        method.end_task(context(model, examples, index, index))


def test_group_starts_from_the_mean_change_of_the_nearest_group(model, examples) -> None:
    """The new task has the rows of task 1, so its B gradient at the start is exactly task 1's."""
    start = model.snapshot()
    method = make(model, start="group")
    ends, stored = [], []
    for index in range(3):
        task = context(model, examples, index, 2 * index)
        method.begin_task(task)
        if index == 0:
            assert all(model.snapshot()[key].equal(start[key]) for key in start)
        move(model, index)
        ends.append(model.snapshot())
        stored.append(method.end_task(task))
    gradients = [memory.tensors["start_gradient"] for memory in stored]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    again = context(model, examples, 3, 2)
    method.begin_task(again)
    torch.testing.assert_close(method.group_start.gradient, gradients[1])
    group = group_of(method.tree, 1)
    assert method.group == group
    assert 1 in group
    expected = mean_change([ends[member] for member in group])
    assert all(model.snapshot()[key].equal(expected[key]) for key in expected)
    assert method.end_task(again).info["started_from"] == [f"task{member}" for member in group]


def test_group_of_a_single_task_is_the_task(model, examples) -> None:
    method = make(model, start="group")
    task = context(model, examples, 0, 0)
    method.begin_task(task)
    move(model, 0)
    end = model.snapshot()
    method.end_task(task)
    method.begin_task(context(model, examples, 1, 4))
    assert method.group == (0,)
    for key in end:
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(
                model.snapshot()[other] @ model.snapshot()[key], end[other] @ end[key],
                rtol=1e-3, atol=1e-6,
            )  # fmt: skip


@pytest.mark.parametrize("search", ["exhaustive", "tree"])
def test_query_compares_the_same_rows_under_an_earlier_adapter(model, examples, search) -> None:
    method = make(model, {"search": search}, signature="query", **{"lambda": 0.5})
    ends = []
    first = collate(examples[:1], 0)
    for index in range(3):
        task = context(model, examples, index, 2 * index)
        method.begin_task(task)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01 * (index + 1))
        step = StepContext(
            0, torch.tensor(1.0), gradient_under=lambda snap: mean_gradient(model, [first])
        )
        method.after_backward(step)
        move(model, index)
        ends.append(model.snapshot())
        method.end_task(task)
    method.begin_task(context(model, examples, 3, 5))
    move(model, 9)
    batch = collate(examples[5:7], 0)
    live = model.snapshot()

    def gradient_at(snapshot) -> torch.Tensor:
        model.restore(snapshot)
        found = mean_gradient(model, [batch])
        by_id = dict(zip(map(id, model.parameters()), found, strict=True))
        return torch.cat([by_id[id(p)].reshape(-1) for p in model.signature_parameters("A")])

    under = [gradient_at(end) for end in ends]
    now = gradient_at(live)
    model.restore(live)
    for parameter, gradient in zip(model.parameters(), mean_gradient(model, [batch]), strict=True):
        parameter.grad = gradient.clone()
    step = StepContext(
        2, torch.tensor(1.0), gradient_under=lambda snap: gradient_under(model, [batch], snap)
    )
    assert method.penalty(step) is None
    method.after_backward(step)
    seen = method.after_step(step)
    arm = seen["arms"][0]
    widths = model.block_widths("A")
    scales = method.bank.scales()
    distance = [
        sum(
            part.abs().mean().item() / scales[d].item()
            for d, part in enumerate((now - other).split(list(widths)))
        ) / len(widths)
        for other in under
    ]  # fmt: skip
    if search == "exhaustive":
        assert arm == min(range(3), key=distance.__getitem__)
    assert seen["xi"].read() == pytest.approx([distance[arm]], rel=1e-4)
    expected = now + method.guide.weights * 0.5 * torch.sign(now - under[arm])
    found = torch.cat([p.grad.reshape(-1) for p in model.signature_parameters("A")])
    torch.testing.assert_close(found, expected)
    assert all(model.snapshot()[key].equal(live[key]) for key in live)


def test_query_refuses_a_search_per_block(model) -> None:
    with pytest.raises(UsageError, match=r"scope=model|scope=block"):
        make(model, {"scope": "block"}, signature="query")


def test_group_start_needs_what_it_stored(model) -> None:
    from treelora_cli.errors import RunDirError
    from treelora_cli.methods.base import StoredTask, TaskMemory

    with pytest.raises(RunDirError, match="start gradient"):
        GroupStart(model, 1).restore([StoredTask(0, "a", TaskMemory())])
