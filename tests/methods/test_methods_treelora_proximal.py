"""The proximal form: soft-thresholding against its definition, and what a task leaves untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import toy_arguments

from treelora_cli.methods._proximal import MOVED, Proximal
from treelora_cli.methods._starts import group_of
from treelora_cli.methods.base import StepContext, StoredTask, StreamContext, TaskContext
from treelora_cli.methods.treelora import TreeLora, TreeLoraSettings
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.snapshot import mean_snapshot
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection
from treelora_cli.rundir.tensors import load_tensors

STEPS = 8


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    return AdaptedModel(backbone, LoraSection(rank=4, dropout=0.0), 0)


def make(model: AdaptedModel, **settings: object) -> TreeLora:
    method = TreeLora(TreeLoraSettings(form="proximal", **settings))
    method.start(StreamContext(7, BanditSection(), TreeSection()), model)
    return method


def task(index: int) -> TaskContext:
    return TaskContext(index, f"task{index}", STEPS, 4, 100 + index)


def step(number: int) -> StepContext:
    return StepContext(number, torch.tensor(1.0))


def move(model: AdaptedModel, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def work(method: TreeLora, model: AdaptedModel, index: int, size: float = 0.02) -> StoredTask:
    """A task of small random steps."""
    method.begin_task(task(index))
    for number in range(STEPS):
        method.penalty(step(number))
        move(model, 10 * index + number, size)
        method.after_step(step(number))
    end = model.snapshot()
    return StoredTask(index, f"task{index}", method.end_task(task(index)), lambda: end)


def test_the_step_is_the_proximal_map_of_the_absolute_value(model: AdaptedModel) -> None:
    """argmin over v of (v - w)^2 / 2 + threshold |v - g|, found on a fine grid."""
    start = model.snapshot()
    proximal = Proximal(model, strength=3.0)
    proximal.begin(start)
    move(model, 1, 0.1)
    moved = proximal.end(model.snapshot())
    expected = [(model.snapshot()[key] - start[key]).abs().mean() for key in start]
    torch.testing.assert_close(moved, torch.stack(expected))
    goal = model.snapshot()
    move(model, 2, 0.1)
    before = model.snapshot()
    proximal.fix([goal], steps_left=6)
    proximal.step()
    after = model.snapshot()
    offsets = torch.linspace(-0.5, 0.5, 200_001, dtype=torch.float64)
    for number, key in enumerate(before):
        threshold = 3.0 * float(moved[number]) / 6
        for at in range(5):
            w, g = before[key].flatten()[at].double(), goal[key].flatten()[at].double()
            values = g + offsets
            cost = (values - w) ** 2 / 2 + threshold * (values - g).abs()
            best = values[cost.argmin()]
            assert float(after[key].flatten()[at]) == pytest.approx(float(best), abs=1e-5)
    equal = torch.cat([(after[key] == goal[key]).flatten() for key in after])
    assert 0.1 < equal.float().mean() < 0.9


@pytest.mark.parametrize("target", ["leaf", "path"])
def test_most_entries_are_exactly_the_groups(model: AdaptedModel, target: str) -> None:
    method = make(model, target=target, **{"lambda": 30.0})
    ends = []
    for index in range(3):
        stored = work(method, model, index)
        ends.append(stored.adapter())
    assert stored.memory.reference
    tree, chosen = method.tree, stored.memory.reference
    assert tree is not None
    assert all(member < 2 for member in chosen)
    assert len(chosen) == (1 if target == "leaf" else 2)
    goal = mean_snapshot([ends[member] for member in chosen])
    kept = torch.cat([(ends[2][key] == goal[key]).flatten() for key in goal]).float().mean()
    assert kept > 0.5
    assert stored.memory.info["group"] == [f"task{member}" for member in chosen]


def test_the_first_task_is_free_and_the_group_comes_after_its_part(model: AdaptedModel) -> None:
    method = make(model, fixed_after=0.5, **{"lambda": 30.0})
    first = work(method, model, 0)
    assert first.memory.reference == ()
    assert first.memory.tensors[MOVED].shape == (len(model.snapshot()),)
    method.begin_task(task(1))
    for number in range(STEPS):
        assert (method.penalty(step(number)) is None) == (number >= STEPS // 2)
        shown = method.after_step(step(number))
        assert ("arms" in shown) == (number < STEPS // 2)
    assert method.reference == (0,)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_the_group_is_that_of_the_nearest_task_not_of_the_first_one(
    model: AdaptedModel, scope: str
) -> None:
    """Two pulls of the leftmost task come before any feedback; they must not decide."""
    method = TreeLora(TreeLoraSettings(form="proximal", fixed_after=0.75, target="path"))
    method.start(StreamContext(7, BanditSection(scope=scope), TreeSection()), model)
    for index in range(4):
        work(method, model, index, 0.1)
    before = method.tree
    method.begin_task(task(4))
    seen: dict[int, list[float]] = {}
    for number in range(6):
        method.penalty(step(number))
        shown = method.after_step(step(number))
        for arm, xi in zip(shown["arms"], shown["xi"].read(), strict=True):
            seen.setdefault(arm, []).append(xi)
        move(model, number, 0.01)
    means = {arm: sum(xis) / len(xis) for arm, xis in seen.items()}
    nearest = min(means, key=means.__getitem__)
    assert before is not None
    assert method.reference == group_of(before, nearest)
    assert nearest == 3  # the weights start where the last task left them


def test_a_task_pulled_often_but_far_away_is_not_the_group(model: AdaptedModel) -> None:
    method = make(model, fixed_after=0.125)  # fixed after the first of eight steps
    for index in range(4):
        work(method, model, index)
    method.begin_task(task(4))
    guide = method.guide
    assert guide is not None
    for arm, xi in ((0, 5.0), (0, 5.5), (0, 5.0), (2, 1.0), (2, 1.5), (3, 1.5)):
        guide.search.update((arm,), [xi])
    guide.aim((0,), fetch=True)
    method.penalty(step(0))
    method.after_step(step(0))
    assert method.reference == (2,)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_task_ends_in_the_same_bytes(model: AdaptedModel, stop: int) -> None:
    method = make(model, **{"lambda": 3.0})
    stored = [work(method, model, index) for index in range(3)]
    method.begin_task(task(3))

    def walk(method: TreeLora, numbers: range) -> None:
        for number in numbers:
            method.penalty(step(number))
            move(model, 300 + number)
            method.after_step(step(number))

    start = model.snapshot()
    walk(method, range(stop))
    middle, (tensors, values) = model.snapshot(), method.state()
    values = json.loads(json.dumps(values))
    walk(method, range(stop, STEPS))
    straight, memory = model.snapshot(), method.end_task(task(3))

    model.restore(start)
    again = make(model, **{"lambda": 3.0})
    again.restore(stored)
    again.begin_task(task(3))
    model.restore(middle)
    again.load_state(tensors, values)
    walk(again, range(stop, STEPS))
    assert all(model.snapshot()[key].equal(straight[key]) for key in straight)
    resumed = again.end_task(task(3))
    assert resumed.reference == memory.reference
    assert resumed.tensors[MOVED].equal(memory.tensors[MOVED])


def test_a_real_run_leaves_entries_equal_to_an_earlier_adapter(
    treelora, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = ["method.form=proximal", "method.lambda=30", "method.target=leaf"]
    more = [part for pair in sets for part in ("--set", pair)]
    arguments = toy_arguments(tiny_model, toy_data, run, "alpha,beta,gamma", *more)
    assert treelora(*arguments).code == 0
    folders = sorted((run / "tasks").iterdir())
    adapters = [load_tensors(path / "adapter" / "adapter_model.safetensors") for path in folders]
    group = json.loads((folders[2] / "task.json").read_text())["group"]
    goal = adapters[["alpha", "beta"].index(group[0])]
    same = [(adapters[2][key] == goal[key]).float().mean() for key in goal]
    assert float(torch.stack(same).mean()) > 0.3
