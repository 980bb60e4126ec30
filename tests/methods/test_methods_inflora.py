"""InfLoRA: what modules read, which directions are used, and what the design must not read."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from rows_support import meet, move, rows, start, step, task

from treelora_cli.errors import RunDirError
from treelora_cli.methods._inputs import read_inputs
from treelora_cli.methods._memory import sample_rows
from treelora_cli.methods._subspace import InputSpace, design, energy_used, with_inputs
from treelora_cli.methods.base import EFFECT, StoredTask, TaskMemory
from treelora_cli.methods.inflora import InfLora
from treelora_cli.recipe import LoraSection

WIDTH = 14


def inputs_of(seed: int, rank: int, width: int = WIDTH) -> np.ndarray:
    """Some inputs of a module, [tokens, width], mostly within a space of that rank."""
    random = np.random.default_rng(seed)
    strong = random.normal(size=(60, rank)) @ random.normal(size=(rank, width))
    return strong + 0.05 * random.normal(size=(60, width))


def covariance(inputs: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(inputs.T @ inputs)


def used_basis(space: InputSpace) -> np.ndarray:
    return space.split(torch.device("cpu")).used.numpy()


def test_the_used_space_is_the_smallest_that_holds_the_energy() -> None:
    """By singular values of the inputs themselves, the used ones always stored: GPM, not dual."""
    thresholds = [0.9, 0.95, 0.8, 0.97, 0.99]
    space, known = InputSpace.unused(WIDTH), np.zeros((WIDTH, 0))
    forms = []
    for seed, threshold in enumerate(thresholds):
        X = inputs_of(seed, 3)
        rest = X - X @ known @ known.T
        held = (X**2).sum() - (rest**2).sum()
        _, values, right = np.linalg.svd(rest, full_matrices=False)
        count = 0
        while held < threshold * (X**2).sum():
            held += values[count] ** 2
            count += 1
        known = np.concatenate([known, right[:count].T], axis=1)
        before = energy_used(space, covariance(X))
        space = with_inputs(space, covariance(X), threshold)
        found = used_basis(space)
        assert found.shape == known.shape
        np.testing.assert_allclose(found @ found.T, known @ known.T, atol=1e-5)
        share = ((X @ known) ** 2).sum() / (X**2).sum()
        assert float(energy_used(space, covariance(X))) == pytest.approx(share, abs=1e-6)
        assert threshold - 1e-9 <= share
        assert float(before) <= share
        assert space.share == known.shape[1] / WIDTH
        assert space.basis.shape[1] <= WIDTH / 2
        forms.append(space.is_free)
    assert forms[0] is False
    assert forms[-1] is True


def test_what_is_used_already_adds_nothing() -> None:
    X = covariance(inputs_of(0, 3))
    space = with_inputs(InputSpace.unused(WIDTH), X, 0.9)
    again = with_inputs(space, X, 0.9)
    assert again.share == space.share > 0
    none = with_inputs(space, torch.zeros(WIDTH, WIDTH), 0.9)
    assert none.share == space.share


@pytest.mark.parametrize("tasks", [1, 5])
def test_the_design_reads_the_strongest_free_directions(tasks: int) -> None:
    space = InputSpace.unused(WIDTH)
    for seed in range(tasks):
        space = with_inputs(space, covariance(inputs_of(seed, 2)), 0.95)
    assert space.is_free == (tasks == 5)
    X = inputs_of(9, 5)
    used = used_basis(space)
    rest = X - X @ used @ used.T
    right = np.linalg.svd(rest)[2]
    A = design(space, covariance(X), 3).numpy()
    np.testing.assert_allclose(A.T @ A, right[:3].T @ right[:3] / 3, atol=1e-5)
    assert np.abs(A @ used).max() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 3**-0.5, rtol=1e-5)


def test_no_direction_is_made_up_where_none_is_left() -> None:
    space = with_inputs(InputSpace.unused(6), torch.diag(torch.tensor([5.0, 4, 3, 2, 0, 0])), 1.0)
    assert space.share == pytest.approx(4 / 6)
    A = design(space, torch.eye(6), 3)
    assert (A.norm(dim=1) > 0.5).tolist() == [True, True, False]
    full = with_inputs(space, torch.eye(6), 1.0)
    assert full.share == 1
    assert not design(full, torch.eye(6), 3).any()
    assert float(energy_used(full, torch.eye(6))) == pytest.approx(1)


def test_inputs_are_what_a_llamas_projections_read(tiny_model: Path) -> None:
    """Recomputed from hidden states and norms; rows differ in length, so padding would show."""
    method = start(InfLora, tiny_model)
    model = method.model
    move(model, 1)
    examples = rows(5, 0)
    found = read_inputs(model, examples, task(model, 0, examples).ask)
    net = model.peft.get_base_model().model
    expected = [torch.zeros(32, 32) for _ in range(2)]
    with torch.no_grad():
        for row in examples:
            states = net(torch.tensor([row.tokens]), output_hidden_states=True).hidden_states
            for depth, layer in enumerate(net.layers):
                x = layer.input_layernorm(states[depth])[0]
                expected[depth] += x.T @ x
    assert len(found.sums) == 2
    for depth, (module, C) in enumerate(found.sums.items()):
        assert f"layers.{depth}.self_attn.q_proj" in module
        torch.testing.assert_close(C, expected[depth], rtol=1e-4, atol=1e-4)
        assert found.first[module.replace("q_proj", "v_proj")] == module
    hooks = [m for m in model.peft.modules() if m._forward_pre_hooks]
    assert not hooks


def test_inputs_of_a_t5_are_those_of_its_encoder_and_its_decoder(tiny_t5: Path) -> None:
    method = start(InfLora, tiny_t5)
    model = method.model
    examples = rows(4, 0, apart=True)
    found = read_inputs(model, examples, task(model, 0, examples).ask)
    cross = next(name for name in found.first if "decoder.block.0" in name and "EncDec" in name
                 and name.endswith(".v"))  # fmt: skip
    expected = torch.zeros(32, 32)
    with torch.no_grad():
        for row in examples:
            prompt = torch.tensor([row.tokens[: row.answer_start]])
            x = model.peft.get_base_model().encoder(prompt).last_hidden_state[0]
            expected += x.T @ x
    torch.testing.assert_close(found.sums[cross], expected, rtol=1e-4, atol=1e-4)
    answers = sum(len(row.tokens) - row.answer_start for row in examples)
    decoder = next(name for name in found.sums if "decoder.block.0.layer.0" in name)
    # The decoder reads as many tokens as it answers; its first norm makes their mean square 1.
    assert float(found.sums[decoder].trace()) == pytest.approx(answers * 32, rel=0.01)


def learn(method: InfLora, index: int) -> StoredTask:
    """Go through a task of random rows and random steps; return it as stored."""
    context = task(method.model, index, rows(12, index))
    method.begin_task(context)
    move(method.model, 50 + index, 0.2)
    memory = method.end_task(context)
    answer = method.model.answer()
    stored = StoredTask(index, context.name, memory, lambda: answer)
    method.install([stored])
    return stored


def test_a_task_adds_nothing_to_what_earlier_tasks_read(tiny_model: Path) -> None:
    method = start(InfLora, tiny_model, {"energy": 0.8, "last_energy": 0.8})
    model = method.model
    live = model.live_parameters
    assert {key for key, p in live.items() if p.requires_grad} == {
        key for key in live if ".lora_B." in key
    }
    assert all(method.learns(key) == p.requires_grad for key, p in live.items())
    first = rows(12, 0)
    before = read_inputs(model, first, task(model, 0, first).ask)
    learn(method, 0)
    context = task(model, 1, rows(12, 1))
    method.begin_task(context)
    assert all(not p.any() for key, p in live.items() if ".lora_B." in key)
    shown = method.after_step(step(0))
    assert 0 < shown[EFFECT] < 1
    assert method.after_step(step(1)) == {}
    inputs = read_inputs(model, context.rows, context.ask)
    expected = np.mean([
        1 - float((C - P @ C @ P.T).trace() / C.trace())
        for C, P in (
            (C.double(), np_projector(method.spaces[module])) for module, C in inputs.sums.items()
        )
    ])  # fmt: skip
    assert shown[EFFECT] == pytest.approx(1 - expected, abs=1e-5)
    for module, space in method.spaces.items():
        A = live[module + ".lora_A.weight"].detach().double()
        assert A.abs().max() > 0.01
        # What the first task's rows have of their energy is hardly read: at most the free fifth.
        C = before.sums[module].double()
        assert float((A @ torch.from_numpy(used_basis(space))).abs().max()) < 1e-6
        assert float((A @ C @ A.T).trace() * 3 / C.trace()) < 0.25


def np_projector(space: InputSpace) -> torch.Tensor:
    used = torch.from_numpy(used_basis(space))
    return torch.eye(len(used), dtype=torch.float64) - used @ used.T


def test_tasks_use_up_their_inputs_at_the_trained_weights(tiny_model: Path) -> None:
    method = start(InfLora, tiny_model, {"energy": 0.6, "last_energy": 0.9, "tasks": 3, "rows": 9})
    model = method.model
    spaces: dict[str, InputSpace] = {}
    for index, threshold in enumerate((0.6, 0.7, 0.8, 0.8)):
        context = task(model, index, rows(12, index))
        method.begin_task(context)
        move(model, 50 + index, 0.2)
        chosen = sample_rows(context.rows, 9, context.seed)
        for module, C in read_inputs(model, chosen, context.ask).sums.items():
            known = spaces.get(module, InputSpace.unused(32))
            spaces[module] = with_inputs(known, C, threshold)
        memory = method.end_task(context)
        answer = model.answer()
        method.install([StoredTask(index, context.name, memory, lambda answer=answer: answer)])
        for module, space in spaces.items():
            assert method.spaces[module].is_free == space.is_free
            assert method.spaces[module].basis.equal(space.basis)
        mean = sum(space.share for space in spaces.values()) / len(spaces)
        assert memory.info["used"] == pytest.approx(mean)


def test_a_resumed_stream_designs_the_same(tiny_model: Path) -> None:
    method = start(InfLora, tiny_model, {"energy": 0.7})
    stored = [learn(method, 0), learn(method, 1)]
    method.begin_task(task(method.model, 2, rows(12, 2)))
    straight = method.model.snapshot()
    model = method.model
    again = meet(InfLora, model, LoraSection(rank=3, alpha=6, dropout=0.0), {"energy": 0.7})
    assert again.spaces == {}
    again.restore(stored)
    again.install(stored)
    again.begin_task(task(model, 2, rows(12, 2)))
    resumed = model.snapshot()
    assert all(resumed[key].equal(straight[key]) for key in straight)
    assert again.taken == method.taken > 0
    with pytest.raises(RunDirError, match="without its input spaces"):
        again.restore([StoredTask(0, "x", TaskMemory())])


def test_it_says_so_when_nothing_can_be_learned(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = start(InfLora, tiny_model, {"energy": 1.0})
    learn(method, 0)
    with caplog.at_level(logging.WARNING, logger="treelora"):
        method.begin_task(task(method.model, 1, rows(12, 1)))
    used = [space.share for space in method.spaces.values()]
    assert used == [1.0, 1.0]
    assert "2 of 2 modules' inputs" in caplog.text
    assert not any(p.any() for p in method.model.live_parameters.values())
