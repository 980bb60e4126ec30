"""GORP against dense singular value decompositions and a plain Adam in numpy."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from treelora_cli.errors import UsageError
from treelora_cli.methods._lowrank import Bases, LowRank, ProjectedAdam, added
from treelora_cli.methods.base import (
    EFFECT,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
)
from treelora_cli.methods.gorp import Gorp, GorpSettings
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection

BETAS = (0.9, 0.999)
LORA = LoraSection(rank=4, dropout=0.0)


def orthonormal(width: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, columns, generator=generator)).Q


def low_rank_gradients(rows: int, columns: int, count: int) -> list[torch.Tensor]:
    """Gradients of rank 3 with well separated singular values, different at every step."""
    found = []
    for number in range(count):
        left, right = orthonormal(rows, 3, 2 * number), orthonormal(columns, 3, 2 * number + 1)
        found.append(left @ torch.diag(torch.tensor([9.0, 4.0, 1.0])) @ right.T)
    return found


def dense(
    weight: np.ndarray, past: np.ndarray, gradients: list[np.ndarray], sides: str, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """W after GaLore's Adam on gradients off the past, and its lifted first moment; gap 2, lr 0.1.

    With full matrices: nothing of the signs that a singular value decomposition leaves open may
    matter in the end.
    """
    W, rows, columns = weight.astype(np.float64), *weight.shape
    free = np.eye(columns) - past @ past.T
    U, V = np.eye(rows), np.eye(columns)
    m = v = None
    for t, G in enumerate(gradients, start=1):
        G = G.astype(np.float64) @ free
        if t % 2 == 1:
            left, _, right = np.linalg.svd(G)
            if sides == "both" or rows < columns:
                U = left[:, :rank]
            if sides == "both" or rows >= columns:
                V = right[:rank].T
        g = U.T @ G @ V
        m = np.zeros_like(g) if m is None else m
        v = np.zeros_like(g) if v is None else v
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        root = np.sqrt(v / (1 - BETAS[1] ** t))
        step = (m / (1 - BETAS[0] ** t)) / (root + 1e-4 * root.max())
        W = W - 0.1 * U @ step @ V.T @ free
    return W, U @ m @ V.T


@pytest.mark.parametrize("sides", ["both", "one"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_two_steps_are_those_of_the_dense_computation(shape: tuple[int, int], sides: str) -> None:
    """Up to the second step, where U and V are still those of the first: Adam divides by entries,
    so that the sign of a singular vector matters once they have changed."""
    weight = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    past = orthonormal(shape[1], 2, 99)
    gradients = low_rank_gradients(*shape, count=2)
    W, moment = dense(
        weight.detach().numpy(), past.numpy(), [g.numpy() for g in gradients], sides, 3
    )
    adam = ProjectedAdam(weight, past, LowRank(3, 2, sides, BETAS))
    for number, gradient in enumerate(gradients):
        away = adam.see(gradient, seed=number)
        assert away.item() == pytest.approx(((gradient @ past) ** 2).sum().item(), rel=1e-4)
        adam.step(0.1)
    np.testing.assert_allclose(weight.detach().numpy(), W, atol=2e-4)
    found = adam.moment()
    np.testing.assert_allclose(found.T @ found, moment.T @ moment, atol=2e-4)


def test_the_gap_decides_when_directions_change() -> None:
    start = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    gradients = low_rank_gradients(9, 6, 2)
    spans = {}
    for gap in (1, 2):
        weight = torch.nn.Parameter(start.clone())
        adam = ProjectedAdam(weight, torch.zeros(6, 0), LowRank(3, gap, "both", BETAS))
        for number, gradient in enumerate(gradients):
            adam.see(gradient, seed=number)
            before = weight.detach().clone()
            adam.step(0.1)
        change = weight.detach() - before
        spans[gap] = [
            torch.linalg.norm(change @ (g.T @ torch.linalg.pinv(g.T)) - change) for g in gradients
        ]
    assert spans[2][0] < 1e-4 < spans[2][1], "the first gradient's directions are kept"
    assert spans[1][1] < 1e-4 < spans[1][0], "the second's are taken"


def test_rounding_makes_no_steps() -> None:
    """The first step's U' G V is diagonal: what is beside the diagonal is rounding alone."""
    weight = torch.nn.Parameter(torch.zeros(12, 7))
    (gradient,) = low_rank_gradients(12, 7, 1)
    adam = ProjectedAdam(weight, torch.zeros(7, 0), LowRank(3, 2, "both", BETAS))
    adam.see(gradient, seed=0)
    adam.step(1.0)
    U, _, V = np.linalg.svd(gradient.numpy())
    steps = np.abs(U[:, :3].T @ weight.detach().numpy() @ V[:3].T)
    np.testing.assert_allclose(steps, np.eye(3), atol=0.03)

    adam = ProjectedAdam(weight, torch.zeros(7, 0), LowRank(3, 2, "both", BETAS))
    adam.see(torch.zeros(12, 7), seed=0)
    before = weight.detach().clone()
    adam.step(1.0)
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("sides", ["both", "one"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_a_weight_never_moves_in_directions_that_are_used(
    shape: tuple[int, int], sides: str
) -> None:
    weight = torch.nn.Parameter(torch.randn(*shape))
    start, past = weight.detach().clone(), orthonormal(shape[1], 2, 5)
    adam = ProjectedAdam(weight, past, LowRank(2, 2, sides, BETAS))
    for number, gradient in enumerate(low_rank_gradients(*shape, count=5)):
        adam.see(gradient + 0.1 * torch.randn(*shape), seed=number)
        adam.step(0.1)
    moved = weight.detach() - start
    assert torch.linalg.norm(moved) > 0.3
    assert torch.linalg.norm(moved @ past) < 1e-5
    assert torch.linalg.norm(adam.moment() @ past) < 1e-5


def test_a_basis_takes_as_few_directions_as_hold_the_energy() -> None:
    """Squares 25, 9, 4, 2 and 1 of 41 in all: two hold 0.83, three 0.93."""
    right = orthonormal(9, 6, 3)
    past, new = right[:, :1], right[:, 1:]
    values = torch.tensor([5.0, 3.0, 2.0, 2.0**0.5, 1.0])
    moment = orthonormal(7, 5, 4) @ torch.diag(values) @ new.T
    for energy, count in ((0.6, 1), (0.8, 2), (0.9, 3), (0.96, 4), (1.0, 5)):
        found = added(moment, past, energy)
        assert found.shape == (9, count)
        torch.testing.assert_close(found.T @ found, torch.eye(count), atol=1e-6, rtol=0)
        inside = torch.linalg.norm(new[:, :count].T @ found)
        assert inside**2 == pytest.approx(count, abs=1e-4)
        assert torch.linalg.norm(past.T @ found) < 1e-6


def test_what_the_basis_holds_already_counts() -> None:
    right = orthonormal(9, 2, 3)
    moment = torch.tensor([[3.0, 0.0], [0.0, 1.0]]) @ right.T
    assert added(moment, right[:, :1], 0.9).shape == (9, 0)
    assert added(moment, right[:, :1], 0.91).shape == (9, 1)
    assert added(torch.zeros(2, 9), right, 0.9).shape == (9, 0)


def test_a_basis_is_full_where_no_direction_is_left() -> None:
    bases = Bases({"a": 3, "b": 2}, torch.device("cpu"))
    assert bases.full() == []
    bases.add({"a": orthonormal(3, 2, 1), "b": orthonormal(2, 2, 1)})
    assert bases.full() == ["b"]
    assert bases.share(["a", "b"]) == pytest.approx((2 / 3 + 1) / 2)
    assert added(torch.randn(4, 2), bases["b"], 1.0).shape == (2, 0)


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    return AdaptedModel(load_backbone(ModelSection(name=str(tiny_model), device="cpu")), LORA, 0)


def make(model: AdaptedModel, **settings: object) -> Gorp:
    method = Gorp(GorpSettings(**settings))
    method.start(StreamContext(7, BanditSection(), TreeSection(), LORA), model)
    return method


def train(method: Gorp, index: int, count: int = 3, first: int = 0) -> list[float]:
    """Give the method random gradients; return what it says it took off."""
    effects = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * index + number)
        for parameter in method.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        step = StepContext(number, torch.tensor(1.0))
        method.after_backward(step)
        effects += method.after_step(step)[EFFECT].read()
    return effects


def task(index: int) -> TaskContext:
    return TaskContext(index, f"task{index}", 10, 5, 100 + index)


def finish(method: Gorp, index: int) -> StoredTask:
    return StoredTask(index, f"task{index}", method.end_task(task(index)))


def test_the_default_weights_are_the_papers(model: AdaptedModel, tiny_t5: Path) -> None:
    assert set(make(model).opened) == {f"model.layers.{n}.mlp.gate_proj.weight" for n in (0, 1)}
    backbone = load_backbone(ModelSection(name=str(tiny_t5), device="cpu"))
    opened = set(make(AdaptedModel(backbone, LORA, 0)).opened)
    assert opened == {
        f"decoder.block.{n}.layer.1.EncDecAttention.{part}.weight" for n in (0, 1) for part in "qv"
    }


def test_weights_can_be_named_and_must_be_there(model: AdaptedModel) -> None:
    method = make(model, weights=("layers.1.self_attn.o_proj", "q_proj"))
    named = method.opened
    assert set(named) == {
        "model.layers.1.self_attn.o_proj.weight",
        *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)),
    }
    keys = [f"weights.{name}" for name, _ in model.backbone.model.named_parameters()]
    keys = [key.replace(".base_layer.", ".") for key in keys if "lora_" not in key]
    assert {key for key in keys if method.learns(key)} == {f"weights.{name}" for name in named}
    assert all(map(method.learns, model.live_parameters))
    with pytest.raises(UsageError, match="no linear module for proj"):
        make(model, weights=("proj",))
    with pytest.raises(UsageError, match="embed_tokens"):
        make(model, weights=("embed_tokens",))


def test_nothing_is_projected_in_the_first_task(model: AdaptedModel) -> None:
    method = make(model)
    method.begin_task(task(0))
    assert train(method, 0) == [0.0, 0.0, 0.0]


def test_gradients_of_a_later_task_lose_the_directions_of_the_first(model: AdaptedModel) -> None:
    method = make(model, lr=0.01)
    method.begin_task(task(0))
    before = {name: w.detach().clone() for name, w in method.opened.items()}
    gradients: list[list[torch.Tensor]] = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients.append([pair.A.grad.clone() for pair in method.live])
        method.after_backward(StepContext(number, torch.tensor(1.0)))
        assert all(weight.grad is None for weight in method.opened.values())
        method.after_step(StepContext(number, torch.tensor(1.0)))
    assert all(not torch.equal(w, before[name]) for name, w in method.opened.items())
    stored = finish(method, 0)

    method.begin_task(task(1))
    wanted = 0.0
    for at, pair in enumerate(method.live):
        # An exponential mean of the first task's gradients, and all of its directions in 0.9.
        moment = sum(0.1 * 0.9 ** (2 - n) * g[at] for n, g in enumerate(gradients))
        values, vectors = np.linalg.svd(moment.numpy(), full_matrices=False)[1:]
        count = 1 + int((np.cumsum(values**2) < 0.9 * (values**2).sum()).sum())
        S = torch.from_numpy(vectors[:count].T)
        assert stored.memory.tensors[pair.module].shape == S.shape
        pair.A.grad = torch.randn(pair.A.shape)
        wanted += ((pair.A.grad @ S) ** 2).sum().item()
        expected = pair.A.grad - pair.A.grad @ S @ S.T
        B = pair.B.grad = torch.randn(pair.B.shape)
        method.after_backward(StepContext(0, torch.tensor(1.0)))
        torch.testing.assert_close(pair.A.grad, expected, atol=1e-5, rtol=0)
        assert pair.B.grad is B
        pair.A.grad = None
    for pair in method.live:
        pair.A.grad = torch.randn(pair.A.shape)
    inside = [pair.A.grad @ method.bases[pair.module] for pair in method.live]
    method.after_backward(StepContext(1, torch.tensor(1.0)))
    norm = sum((part**2).sum().item() for part in inside) ** 0.5
    assert method.after_step(StepContext(1, torch.tensor(1.0)))[EFFECT].read() == [
        pytest.approx(norm, rel=1e-4)
    ]


def test_the_released_codes_basis_fills_and_is_warned_of(
    model: AdaptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """In R^r nothing is left to train once the basis has r columns; the inputs have room."""
    for basis, warned in (("rank", True), ("input", False)):
        caplog.clear()
        method = make(model, adapter_basis=basis, energy=1.0)
        with caplog.at_level(logging.WARNING, logger="treelora"):
            method.begin_task(task(0))
            train(method, 0, 6)
            first = finish(method, 0)
            method.begin_task(task(1))
        assert first.memory.info["full_bases"] == []
        modules = [pair.module for pair in method.live]
        assert len(caplog.records) == (1 if warned else 0)
        assert all(("task task1" in record.message) == warned for record in caplog.records)
        for pair in method.live:
            pair.A.grad = torch.randn(pair.A.shape)
        method.after_backward(StepContext(0, torch.tensor(1.0)))
        left = max(pair.A.grad.abs().max().item() for pair in method.live)
        assert (left < 1e-4) == warned
        info = finish(method, 1).memory.info
        assert info["full_bases"] == (modules if warned else [])
        assert (info["basis_share"]["adapter"] == 1.0) == warned


def test_a_checkpoint_and_stored_tasks_bring_back_the_same_state(tiny_model: Path) -> None:
    def fresh() -> AdaptedModel:
        backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
        return AdaptedModel(backbone, LORA, 0)

    method = make(fresh(), lr=0.01, gap=2)
    method.begin_task(task(0))
    train(method, 0)
    answer = method.model.answer()
    first = StoredTask(0, "task0", method.end_task(task(0)), lambda: answer)
    method.install([first])
    method.begin_task(task(1))
    train(method, 1)
    state, snapshot = method.state(), method.model.snapshot()
    again = make(fresh(), lr=0.01, gap=2)
    again.restore([first])
    again.install([first])
    again.begin_task(task(1))
    again.model.restore(snapshot)
    again.load_state(*state)

    for one in (method, again):
        train(one, 1, first=3)
    left, right = method.end_task(task(1)), again.end_task(task(1))
    assert left.info == right.info
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(left.tensors[key], right.tensors[key]) for key in left.tensors)
    mine, theirs = method.model.snapshot(), again.model.snapshot()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_whole_weights_and_the_sum_of_adapters_answer(model: AdaptedModel) -> None:
    method = make(model, lr=0.1)
    method.begin_task(task(0))
    with torch.no_grad():
        for pair in method.live:
            pair.B.normal_()
    train(method, 0)
    ids = torch.tensor([[3, 5, 8, 13]])
    with torch.no_grad():
        wanted = model.peft(input_ids=ids).logits
        with model.as_base():
            base = model.peft(input_ids=ids).logits
    answer = model.answer()
    method.install([StoredTask(0, "task0", finish(method, 0).memory, lambda: answer)])
    method.begin_task(task(1))
    with torch.no_grad():
        found = model.peft(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - base).abs().max() > 1e-3
    assert {key for key in answer if key.startswith("weights.")} == {
        f"weights.{name}" for name in method.opened
    }
