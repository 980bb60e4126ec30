"""TreeLoRA on a live model against independent recomputation of its equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from brute import brute_force_arm

from treelora_cli.errors import UsageError
from treelora_cli.methods import registry
from treelora_cli.methods.base import (
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    build_method,
)
from treelora_cli.methods.treelora import TreeLora, TreeLoraSettings
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection, build_recipe
from treelora_cli.tree.scopes import node_deltas

STEPS = 10


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    return AdaptedModel(backbone, LoraSection(rank=4, dropout=0.0), 0)


def make(
    model: AdaptedModel, bandit: dict[str, object] | None = None, **settings: object
) -> TreeLora:
    paper = {"form": "subgradient", "target": "path"}
    method = TreeLora(TreeLoraSettings(**(paper | settings)))
    method.start(StreamContext(7, BanditSection(**(bandit or {})), TreeSection()), model)
    return method


def task(index: int) -> TaskContext:
    return TaskContext(index, f"task{index}", STEPS, 5, 100 + index)


def move(model: AdaptedModel, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def step(number: int) -> StepContext:
    return StepContext(number, torch.tensor(1.0))


def train(method: TreeLora, model: AdaptedModel, count: int) -> list[StoredTask]:
    stored = []
    for index in range(count):
        method.begin_task(task(index))
        move(model, index)
        stored.append(StoredTask(index, f"task{index}", method.end_task(task(index))))
    return stored


def flat(model: AdaptedModel) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.signature_parameters("A")])


def test_the_registry_finds_every_method_by_its_file() -> None:
    names = registry().names()
    assert {"per-task", "seqlora", "treelora", "treelora-official"} <= set(names)
    assert names == sorted(names)


def test_nothing_is_added_before_there_is_a_task_to_compare_with(model: AdaptedModel) -> None:
    method = make(model)
    method.begin_task(task(0))
    assert method.penalty(step(0)) is None
    assert method.after_step(step(0)) == {}


@pytest.mark.parametrize("signature", ["lora_a", "lora_delta"])
@pytest.mark.parametrize("target", ["path", "leaf"])
def test_penalty_and_gradient_are_the_equation(
    model: AdaptedModel, signature: str, target: str
) -> None:
    """Recompute lambda * ramp / (D F_d m_d) * |s - target| from the stored tasks in plain loops."""
    strength, number = 0.7, 4
    method = make(model, {"search": "exhaustive"}, **{
        "lambda": strength, "signature": signature, "target": target
    })  # fmt: skip
    starts, ends = [], []
    for index in range(3):
        method.begin_task(task(index))
        starts.append(flat(model))
        move(model, index)
        ends.append(flat(model))
        method.end_task(task(index))
    stored = [
        end if signature == "lora_a" else end - start
        for start, end in zip(starts, ends, strict=True)
    ]
    method.begin_task(task(3))
    origin = flat(model)
    move(model, 9, 0.02)
    method.after_step(step(number - 1))  # the exhaustive search looks at the weights after a step
    live = flat(model) if signature == "lora_a" else flat(model) - origin

    widths = model.block_widths("A")
    edges = [0, widths[0], widths[0] + widths[1]]

    def block(vector: torch.Tensor, d: int) -> torch.Tensor:
        return vector[edges[d] : edges[d + 1]]

    mean = sum(stored) / 3
    scale = [sum((block(s - mean, d)).abs().mean().item() for s in stored) / 3 for d in range(2)]
    distance = [
        sum(block(live - s, d).abs().mean().item() / scale[d] for d in range(2)) / 2 for s in stored
    ]
    chosen = min(range(3), key=lambda k: distance[k])
    path = method.tree.path_to(chosen)
    moved = [
        sum(
            block(end - start, d).abs().mean().item()
            for start, end in zip(starts, ends, strict=True)
        )
        / 3
        for d in range(2)
    ]
    expected, gradient = 0.0, []
    for d in range(2):
        node = method.tree.nodes[path[min(d, len(path) - 1)] if target == "path" else path[-1]]
        goal = sum(block(stored[k], d) for k in node.tasks) / len(node.tasks)
        weight = strength * (number / STEPS) / (2 * widths[d] * moved[d])
        expected += weight * (block(live, d) - goal).abs().sum().item()
        gradient.append(weight * torch.sign(block(live, d) - goal))

    value = method.penalty(step(number))
    seen = method.after_step(step(number))
    assert seen["arms"] == [chosen]
    assert seen["xi"].read() == pytest.approx([distance[chosen]], rel=1e-4)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    found = torch.cat([p.grad.reshape(-1) for p in model.signature_parameters("A")])
    torch.testing.assert_close(found, torch.cat(gradient), rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for block_ in model.blocks for p in block_.B)


def test_gradient_signature_adds_the_sign_term_and_keeps_the_running_mean(
    model: AdaptedModel,
) -> None:
    method = make(model, {"search": "exhaustive"}, signature="gradient", **{"lambda": 0.5})
    generator = torch.Generator().manual_seed(3)

    def give_gradients() -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return torch.cat([p.grad.reshape(-1) for p in model.signature_parameters("A")])

    def epoch(index: int) -> list[torch.Tensor]:
        method.begin_task(task(index))
        seen = []
        for number in range(3):
            seen.append(give_gradients())
            assert method.penalty(step(number)) is None
            method.after_backward(step(number))
            move(model, number, 0.01)
        return seen

    first = epoch(0)
    record = method.end_task(task(0)).tree
    torch.testing.assert_close(record.tensors["values"][0], sum(first) / 3)

    method.begin_task(task(1))
    given = give_gradients()
    method.after_backward(step(5))
    weights = method.guide.weights * 0.5
    expected = given + weights * torch.sign(given - sum(first) / 3)
    found = torch.cat([p.grad.reshape(-1) for p in model.signature_parameters("A")])
    torch.testing.assert_close(found, expected)


def test_lora_a_distances_favour_the_last_task_where_deltas_do_not(model: AdaptedModel) -> None:
    """Weights drift under `continue`: a task equal to the first still looks like the last one."""

    def nearest(signature: str) -> int:
        model.reset()
        method = make(model, {"search": "exhaustive"}, signature=signature)
        for index in range(4):
            method.begin_task(task(index))
            move(model, index)
            method.end_task(task(index))
        method.begin_task(task(4))
        move(model, 0)  # moves exactly as task 0 did
        method.after_step(step(0))
        method.penalty(step(1))
        return method.after_step(step(1))["arms"][0]

    assert nearest("lora_delta") == 0
    assert nearest("lora_a") == 3


@pytest.mark.parametrize("search", ["tree", "flat", "random"])
def test_a_checkpoint_inside_a_task_goes_on_as_if_nothing_had_been(
    model: AdaptedModel, search: str
) -> None:
    method = make(model, {"search": search})
    stored = train(method, model, 5)
    method.begin_task(task(5))
    base = model.snapshot()

    def walk(method: TreeLora, numbers: range) -> list[tuple[object, ...]]:
        seen = []
        for number in numbers:
            move(model, 50 + number, 0.01)
            value = method.penalty(step(number)).item()
            shown = method.after_step(step(number))
            seen.append((shown["arms"], shown["xi"].read(), value))
        return seen

    head = walk(method, range(4))
    assert len(head) == 4
    middle, saved = model.snapshot(), method.state()
    tail = walk(method, range(4, 10))

    model.restore(base)
    again = make(model, {"search": search})
    again.restore(stored)
    again.begin_task(task(5))
    again.load_state(*saved)
    model.restore(middle)
    assert walk(again, range(4, 10)) == tail


@pytest.mark.parametrize("delta", ["observed", "median", "bound"])
def test_live_arms_are_those_of_equation_2(model: AdaptedModel, delta: str) -> None:
    method = make(model, {"search": "tree", "c": 0.5, "delta": delta})
    train(method, model, 6)
    method.begin_task(task(6))
    deltas = node_deltas(method.tree, method.bank, delta)[0]
    log: list[tuple[int, float]] = []
    for number in range(40):
        move(model, 200 + number, 0.02)
        method.penalty(step(min(number, STEPS - 1)))
        seen = method.after_step(step(number))
        # A step's task is chosen when the step before has ended, from feedback older than that.
        expected = brute_force_arm(method.tree, deltas, log[:-1], 0.5)
        assert seen["arms"] == [expected], f"pull {number}"
        log.append((seen["arms"][0], seen["xi"].read()[0]))
    assert len({arm for arm, _ in log}) > 1


def test_all_feedback_has_been_learned_when_the_task_ends(model: AdaptedModel) -> None:
    method = make(model, {"search": "flat"})
    train(method, model, 3)
    method.begin_task(task(3))
    seen = []
    for number in range(5):
        move(model, 300 + number, 0.02)
        method.penalty(step(number))
        seen.append(method.after_step(step(number)))
    statistics = method.end_task(task(3)).info["bandit"][0]
    assert statistics["total"] == 5
    for arm in range(3):
        found = [shown["xi"].read()[0] for shown in seen if shown["arms"] == [arm]]
        assert statistics["pulls"][arm] == len(found)
        mean = sum(found) / len(found) if found else None
        assert statistics["means"][arm] == (pytest.approx(mean) if found else None)


def test_settings_of_a_method_are_checked() -> None:
    with pytest.raises(UsageError, match="lamda") as raised:
        build_method(build_recipe({"method": {"name": "treelora", "lamda": 1}}, "r"))
    assert "lambda" in raised.value.hint
    with pytest.raises(UsageError, match="unknown method 'treelore'") as raised:
        build_method(build_recipe({"method": {"name": "treelore"}}, "r"))
    assert "treelora" in raised.value.hint
    with pytest.raises(UsageError, match="lambda"):
        build_method(build_recipe({"method": {"name": "seqlora", "lambda": 1}}, "r"))
